#!/usr/bin/env bash
# transformers 5.24.0: MambaForCausalLM and Mamba2ForCausalLM with use_bias=True, left padding.
# Expected: attention_mask makes padding harmless on the left, as it does in models without biases.
# Instead: padded inputs are set to 0 before the projection, whose bias then enters the short convolution: the first three real
#   tokens see three columns of it, the state as well, and all logits move. Cutting the padding off is the way out.
# Seen when run:
#   MambaForCausalLM: left padding, without biases 0.0e+00, with use_bias=True 1.9e-01
#   Mamba2ForCausalLM: left padding, without biases 2.1e-08, with use_bias=True 1.8e-01
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
torch.set_grad_enabled(False)
small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=1, eos_token_id=2)
torch.manual_seed(0)
real, fill = torch.randint(3, 50, (1, 8)), torch.zeros(1, 4, dtype=torch.long)
mask = torch.cat([torch.zeros_like(fill), torch.ones_like(real)], 1)
for kind, config, more in (
    (MambaForCausalLM, MambaConfig, {}),
    (Mamba2ForCausalLM, Mamba2Config, dict(num_heads=4, head_dim=16, n_groups=1)),
):
    errors = {}
    for bias in (False, True):
        torch.manual_seed(0)
        model = kind(config(**small, **more, use_bias=bias)).eval()
        for name, p in model.named_parameters():
            if (p.ndim > 1 and not name.endswith("A_log")) or name.endswith("in_proj.bias"):
                torch.nn.init.normal_(p, std=0.3)
        alone = model(real).logits
        padded = model(torch.cat([fill, real], 1), attention_mask=mask).logits[:, 4:]
        errors[bias] = ((padded - alone).norm() / alone.norm()).item()
    print(f"{kind.__name__}: left padding, without biases {errors[False]:.1e}, with use_bias=True {errors[True]:.1e}")
    assert errors[False] < 1e-4 and errors[True] > 1e-2
PY
env/bin/python check.py
