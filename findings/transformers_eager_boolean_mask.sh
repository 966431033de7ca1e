#!/usr/bin/env bash
# transformers 5.24.0: a boolean attention_mask of four axes and attn_implementation="eager".
# Expected: True = visible, as in attn_implementation="sdpa", which takes the same array, and in masks of two axes; or an error.
# Instead: a mask of four axes passes as it is, and eager attention adds it to the logits: 1 to what is visible, 0 to what is
#   hidden. Nothing is hidden then, causality neither, and no warning is given. Only a float mask of 0 and -inf works in both.
# Seen when run:
#   eager: with the causal mask given as a boolean array of four axes 9.0e-01 from without it
#   sdpa: with the causal mask given as a boolean array of four axes 0.0e+00 from without it
#   eager: another last token moves the logits of earlier ones by 5.2e+00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
torch.manual_seed(0)
small = dict(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
model = LlamaForCausalLM(LlamaConfig(**small)).eval()
tokens = torch.randint(3, 50, (1, 8))
mask = torch.ones(8, 8).tril().bool()[None, None]  # causal, as a model makes it of itself
logits = {}
for name in ("eager", "sdpa"):
    model.set_attn_implementation(name)
    logits[name] = model(tokens).logits
    given = model(tokens, attention_mask=mask).logits
    error = ((given - logits[name]).norm() / logits[name].norm()).item()
    print(f"{name}: with the causal mask given as a boolean array of four axes {error:.1e} from without it")
    assert error > 0.1 if name == "eager" else error < 1e-5
changed = tokens.clone()
changed[0, -1] = (tokens[0, -1] - 3 + 1) % 47 + 3
model.set_attn_implementation("eager")
moved = (model(changed, attention_mask=mask).logits - model(tokens, attention_mask=mask).logits)[:, :-1].abs().max().item()
print(f"eager: another last token moves the logits of earlier ones by {moved:.1e}")
assert moved > 1e-2
PY
env/bin/python check.py
