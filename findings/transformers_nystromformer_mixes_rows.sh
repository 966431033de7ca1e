#!/usr/bin/env bash
# transformers 5.24.0: NystromformerModel with segment_means_seq_len=64 on shorter inputs.
# Expected: each row of a batch is its own sequence; an input length the configuration does
#   not fit is refused.
# Instead: only batch times length must be a multiple of 64. Two rows of 32 tokens pass and
#   the landmarks are means over both rows: the first row's output changes with the second
#   row's tokens. One row of 32 tokens raises a reshape error. (At 64 tokens a row about 1 % is
#   left: the pseudo-inverse starts from a maximum over the whole batch.)
# Seen when run:
#   32 tokens a row: first row moves by 4.2e-01 when the second changes
#   64 tokens a row: first row moves by 9.9e-03 when the second changes
#   one row of 32: shape '[-1, 2, 8, 8, 16]' is invalid for input of size 1024
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import NystromformerConfig, NystromformerModel

transformers.logging.set_verbosity_error()
rel = lambda a, b: ((a - b).norm() / b.norm()).item()


def awake(model):
    """Random weights large enough that every part of the model matters."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1 and not name.endswith("A_log"):
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


torch.set_grad_enabled(False)
torch.manual_seed(0)

config = NystromformerConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    segment_means_seq_len=64, num_landmarks=8, max_position_embeddings=128,
)
model = awake(NystromformerModel(config))
for n in (32, 64):
    a = torch.randint(0, 50, (2, n))
    b = torch.cat([a[:1], torch.randint(0, 50, (1, n))])
    moved = rel(model(b)[0][0], model(a)[0][0])
    print(f"{n} tokens a row: first row moves by {moved:.1e} when the second changes")
    assert moved > 0.1 if n == 32 else moved < 0.05
try:
    model(a[:1, :32])
except RuntimeError as exc:
    print("one row of 32:", str(exc)[:60])
else:
    raise SystemExit("one row of 32 tokens works now")
PY
env/bin/python check.py
