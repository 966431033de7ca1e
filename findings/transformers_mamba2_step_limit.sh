#!/usr/bin/env bash
# transformers 5.24.0: Mamba2Config(time_step_limit=(low, high)) in one-token decoding.
# Expected: the limit on the step size is part of the model, so decoding with a cache gives
#   the logits of one pass.
# Instead: the full pass clamps the step size, the one-token update does not: with a finite
#   upper limit the decoded logits are more than a tenth off; with none both agree.
# Seen when run:
#   upper limit 0.1: decoding against one pass 1.3e-01
#   upper limit inf: decoding against one pass 4.8e-07
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM

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

small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=1, eos_token_id=2, num_heads=4, head_dim=16, n_groups=1)
ids = torch.randint(0, 50, (1, 24))
for high in (0.1, float("inf")):
    model = awake(Mamba2ForCausalLM(Mamba2Config(**small, time_step_limit=(0.0, high))))
    whole = model(ids).logits[:, 12:]
    cache = model(ids[:, :12], use_cache=True).cache
    steps = [model(ids[:, t : t + 1], cache=cache, use_cache=True).logits for t in range(12, 24)]
    err = rel(torch.cat(steps, 1), whole)
    print(f"upper limit {high}: decoding against one pass {err:.1e}")
    assert err > 0.05 if high < 1 else err < 1e-4
PY
env/bin/python check.py
