#!/usr/bin/env bash
# transformers 5.24.0: MraModel where its CUDA kernel is not loaded: on a CPU, and wherever loading it fails.
# Expected: slower attention by plain operations, or an error: without its kernel the model has no attention.
# Instead: every attention layer returns zeros. No warning is given at all on a machine without CUDA. Each token is then processed by itself:
#   no other token has any influence, masks do nothing, queries, keys and values get no gradient, and the output still looks like one.
#   Tests, exports and fine-tuning on a CPU run through and mean nothing.
# Seen when run:
#   BertModel: token 64, with all 127 other tokens replaced, moves by 6.3e-01; 0 of 6 projections have no gradient
#   MraModel: token 64, with all 127 other tokens replaced, moves by 0.0e+00; 6 of 6 projections have no gradient
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import BertConfig, BertModel, MraConfig, MraModel

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
small = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, max_position_embeddings=256,
)
ids = torch.randint(5, 50, (1, 128))
other = torch.randint(5, 50, (1, 128))
other[:, 64] = ids[:, 64]
for model in (BertModel(BertConfig(**small)), MraModel(MraConfig(**small))):
    torch.manual_seed(0)
    for p in model.eval().parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    first, second = (model(x).last_hidden_state[:, 64] for x in (ids, other))
    moved = ((first - second).norm() / first.norm()).item()
    model(ids).last_hidden_state[..., 0].sum().backward()
    still = [n for n, p in model.named_parameters() if n.endswith(("query.weight", "key.weight", "value.weight"))
             and (p.grad is None or not p.grad.any())]
    print(f"{type(model).__name__}: token 64, with all 127 other tokens replaced, moves by {moved:.1e}; "
          f"{len(still)} of 6 projections have no gradient")
    assert (moved > 0.1 and not still) if isinstance(model, BertModel) else (moved == 0 and len(still) == 6)
PY
env/bin/python check.py
