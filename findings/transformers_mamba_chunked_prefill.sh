#!/usr/bin/env bash
# transformers 5.24.0: MambaForCausalLM given several tokens together with a cache.
# Expected: a prompt fed in two halves through the cache gives the logits of one pass, as
#   feeding it token by token does, and as Mamba-2 does.
# Instead: Mamba (version 1) starts its state from zero again at the second half and only
#   carries the convolution's inputs over. Nothing is raised; the logits are 40 % off.
# Seen when run:
#   MambaForCausalLM: second half at once 4.2e-01, token by token 5.2e-07
#   Mamba2ForCausalLM: second half at once 2.1e-07, token by token 3.7e-07
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

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

small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=1, eos_token_id=2)
models = [
    awake(MambaForCausalLM(MambaConfig(**small))),
    awake(Mamba2ForCausalLM(Mamba2Config(**small, num_heads=4, head_dim=16, n_groups=1))),
]
ids = torch.randint(0, 50, (1, 24))
for model in models:
    whole = model(ids).logits[:, 12:]
    cache = model(ids[:, :12], use_cache=True).cache
    halves = model(ids[:, 12:], cache=cache, use_cache=True).logits
    cache = model(ids[:, :12], use_cache=True).cache
    steps = [model(ids[:, t : t + 1], cache=cache, use_cache=True).logits for t in range(12, 24)]
    err = rel(halves, whole), rel(torch.cat(steps, 1), whole)
    print(f"{type(model).__name__}: second half at once {err[0]:.1e}, token by token {err[1]:.1e}")
    assert err[1] < 1e-4 and (err[0] > 0.05 if model is models[0] else err[0] < 1e-4)
PY
env/bin/python check.py
