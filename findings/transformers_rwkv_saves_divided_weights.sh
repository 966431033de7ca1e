#!/usr/bin/env bash
# transformers 5.24.0: save_pretrained of RwkvForCausalLM after it has been evaluated.
# Expected: eval() and a forward pass leave the weights alone, and save_pretrained writes the model: what is loaded gives the logits
#   of what was saved.
# Instead: the first pass in eval() divides the output projections of layer l by 2 ** (l // rescale_every) in place, against overflow in
#   float16 and in every dtype; a flag that is not saved remembers it. state_dict() and save_pretrained() then hold the divided weights, and
#   the loaded model divides them again. "Evaluate, then save the best checkpoint" writes another model, without a word; train() alone
#   does not undo it, a forward pass in training mode does. With the default rescale_every=6 all models of more than six layers are hit.
# Seen when run (relative difference of logits, loaded against saved):
#   6 layers: saved before any pass 0.0e+00, after a pass in eval() 0.0e+00; weights of the last layer 1 times those before the pass
#   12 layers: saved before any pass 0.0e+00, after a pass in eval() 3.5e-01; weights of the last layer 0.5 times those before the pass
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import RwkvConfig, RwkvForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def reloaded(model, folder):
    model.save_pretrained(folder)
    return RwkvForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def check(layers):
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=50, hidden_size=32, num_hidden_layers=layers, context_length=64)
    model = RwkvForCausalLM(config).eval()
    for p in model.parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(0, 50, (1, 20))
    weight = model.rwkv.blocks[-1].attention.output.weight
    original = weight.clone()
    early = reloaded(model, "early")
    logits = model(ids).logits
    late = reloaded(model, "late")
    factor = (weight / original).mean().item()
    off = [((m(ids).logits - logits).norm() / logits.norm()).item() for m in (early, late)]
    print(f"{layers} layers: saved before any pass {off[0]:.1e}, after a pass in eval() {off[1]:.1e}; "
          f"weights of the last layer {factor:g} times those before the pass")
    return *off, factor


assert check(6) == (0, 0, 1)
early, late, factor = check(12)
assert early == 0 and late > 0.01 and factor == 0.5
PY
env/bin/python check.py
