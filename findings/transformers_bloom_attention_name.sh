#!/usr/bin/env bash
# transformers 5.24.0: a registered attention function with BloomModel.
# Expected: AttentionInterface.register(name, f) and attn_implementation=name make the model
#   call f; a model outside that interface refuses the name.
# Instead: the name is accepted, f is never called, and since no mask is made for an unknown
#   name the model's own attention runs without its causal mask: earlier outputs change when
#   the last token does. With "eager" they do not. Nothing is raised.
# Seen when run:
#   eager: earlier outputs move by 0.00 relative; function called 0 times
#   mine: earlier outputs move by 0.26 relative; function called 0 times
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import AttentionInterface, BloomConfig, BloomModel

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

calls = []
AttentionInterface.register("mine", lambda *args, **kwargs: calls.append(1))
config = BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
ids = torch.randint(0, 50, (1, 16))
other = ids.clone()
other[:, -1] = (other[:, -1] + 1) % 50
for name in ("eager", "mine"):
    model = awake(BloomModel._from_config(config, attn_implementation=name))
    moved = rel(model(other)[0][:, :-1], model(ids)[0][:, :-1])
    print(f"{name}: earlier outputs move by {moved:.2f} relative; function called {len(calls)} times")
    assert not calls and (moved < 1e-6 if name == "eager" else moved > 0.05)
PY
env/bin/python check.py
