#!/usr/bin/env bash
# transformers 5.24.0: attention_mask of YosoModel.
# Expected: keys whose mask is 0 have no influence, as in BertModel, so that a padded sequence has the outputs
#   it has alone.
# Instead: the layer still turns its mask back into 0 and 1 by a formula for additive masks (0 and -10000), while the model now hands it the
#   mask of 0 and 1 itself; both come out as 1. The mask changes not one bit of the output: all padding is attended to, in
#   training too, and outputs depend on how long the longest row of the batch is.
# Seen when run (relative):
#   BertModel: padded against alone 0.0e+00, other content of the padding 0.0e+00, mask against all ones 5.5e-01
#   YosoModel: padded against alone 1.1e-01, other content of the padding 1.2e-01, mask against all ones 0.0e+00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import BertConfig, BertModel, YosoConfig, YosoModel

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
small = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, max_position_embeddings=256,
)
torch.manual_seed(0)
ids, fill, other = (torch.randint(5, 50, (1, n)) for n in (64, 32, 32))
mask = (torch.arange(96) < 64).long()[None]
for model in (BertModel(BertConfig(**small)), YosoModel(YosoConfig(**small))):
    torch.manual_seed(0)
    for p in model.eval().parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    run = lambda x, mask: model(x, attention_mask=mask).last_hidden_state[:, :64]
    padded = run(torch.cat([ids, fill], 1), mask)
    off = [
        rel(padded, run(ids, mask[:, :64])),
        rel(run(torch.cat([ids, other], 1), mask), padded),
        rel(padded, run(torch.cat([ids, fill], 1), torch.ones_like(mask))),
    ]
    print(f"{type(model).__name__}: padded against alone {off[0]:.1e}, other content of the padding {off[1]:.1e}, "
          f"mask against all ones {off[2]:.1e}")
    assert off[0] > 0.05 and off[1] > 0.05 and off[2] == 0 if isinstance(model, YosoModel) else max(off[:2]) < 1e-5 < off[2]
PY
env/bin/python check.py
