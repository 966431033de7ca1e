#!/usr/bin/env bash
# transformers 5.24.0: MambaForCausalLM and FalconMambaForCausalLM, one token with a cache and an attention_mask of the whole length.
# Expected: as in every decoder, attention_mask covers the cached tokens and the new one; all ones change nothing.
# Instead: the layer multiplies the one column of the token by the mask of t columns, and the result has t columns: the convolution
#   remembers several copies of the token. The first such step is right, the logits of the next one are as wrong as
#   random ones. Mamba2ForCausalLM ignores the mask there; generate() passes none and is right.
# Seen when run:
#   MambaForCausalLM: two single tokens, without a mask 2.8e-07, with a mask of ones 1.7e+00
#   FalconMambaForCausalLM: two single tokens, without a mask 6.9e-07, with a mask of ones 9.8e-01
#   Mamba2ForCausalLM: two single tokens, without a mask 6.1e-07, with a mask of ones 6.1e-07
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import FalconMambaConfig, FalconMambaForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
torch.manual_seed(0)
small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=1, eos_token_id=2)
models = [
    MambaForCausalLM(MambaConfig(**small)),
    FalconMambaForCausalLM(FalconMambaConfig(**small)),
    Mamba2ForCausalLM(Mamba2Config(**small, num_heads=4, head_dim=16, n_groups=1)),
]
tokens = torch.randint(3, 50, (1, 8))
for model in models:
    for name, p in model.named_parameters():
        if p.ndim > 1 and not name.endswith("A_log"):
            torch.nn.init.normal_(p, std=0.3)
    model.eval()
    want = model(tokens).logits
    errors = {}
    for given in (False, True):
        cache = model(tokens[:, :6], use_cache=True).cache
        for t in (6, 7):
            mask = torch.ones(1, t + 1, dtype=torch.long) if given else None
            out = model(tokens[:, t : t + 1], attention_mask=mask, cache=cache, use_cache=True)
            cache = out.cache
        errors[given] = ((out.logits[:, -1] - want[:, -1]).norm() / want[:, -1].norm()).item()
    print(f"{type(model).__name__}: two single tokens, without a mask {errors[False]:.1e}, with a mask of ones {errors[True]:.1e}")
    assert errors[False] < 1e-4
    assert (errors[True] > 0.1) == (type(model).__name__ != "Mamba2ForCausalLM")
PY
env/bin/python check.py
