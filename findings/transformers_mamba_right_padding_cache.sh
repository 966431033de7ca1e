#!/usr/bin/env bash
# transformers 5.24.0: MambaForCausalLM, Mamba2ForCausalLM, cache of a right-padded prompt.
# Expected: with attention_mask given, the cache of a padded prompt is that of the prompt
#   alone, so the next token gets the same logits.
# Instead: masked positions have zero input, but the state still decays through them and the
#   convolution remembers the zeros: after four padded positions on the right the next
#   token's logits are about as wrong as random ones. Four on the left are harmless.
# Seen when run:
#   MambaForCausalLM: right padding 9.8e-01, left padding 2.2e-07
#   Mamba2ForCausalLM: right padding 1.5e+00, left padding 2.5e-07
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
real, fill, nxt = torch.randint(3, 50, (1, 8)), torch.zeros(1, 4, dtype=torch.long), torch.tensor([[7]])
on, off = torch.ones_like(real), torch.zeros_like(fill)
for model in models:
    want = model(torch.cat([real, nxt], 1)).logits[:, -1]
    err = []
    for ids, mask in (((real, fill), (on, off)), ((fill, real), (off, on))):
        cache = model(torch.cat(ids, 1), attention_mask=torch.cat(mask, 1), use_cache=True).cache
        err.append(rel(model(nxt, cache=cache, use_cache=True).logits[:, -1], want))
    print(f"{type(model).__name__}: right padding {err[0]:.1e}, left padding {err[1]:.1e}")
    assert err[0] > 0.1 and err[1] < 1e-4
PY
env/bin/python check.py
