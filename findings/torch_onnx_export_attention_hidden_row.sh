#!/usr/bin/env bash
# torch 2.13.0, onnxscript 0.7.2, onnxruntime 1.32.0: torch.onnx.export(dynamo=True) of scaled_dot_product_attention, default opset.
# Expected: a query that may see no key, as in a wholly padded row, has the output 0 in torch, for a boolean mask and for one of 0 and -inf; an
#   exported file gives that too. The scale is a number, whatever its sign.
# Instead: attention is written as plain operations. With a boolean mask the hidden row is the average of all the values that the mask
#   forbids; with the same mask as numbers it is NaN. The scale is split as a square root over queries and keys, so that a negative one makes
#   every output NaN. Other rows are right. With opset_version=23 hidden rows are 0.
# Seen when run (largest number of the hidden row; other rows, largest difference from torch):
#   mask boolean, opset default: torch 0, exported 0.84; other rows 1.8e-07
#   mask boolean, opset 23: torch 0, exported 0; other rows 1.2e-07
#   mask numbers, opset default: torch 0, exported nan; other rows 1.8e-07
#   mask numbers, opset 23: torch 0, exported 0; other rows 1.2e-07
#   scale -0.3: torch 0 of 32 numbers NaN, exported 32
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import logging
import warnings

import numpy as np
import onnxruntime
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


class Attend(torch.nn.Module):
    def __init__(self, scale=None):
        super().__init__()
        self.scale = scale

    def forward(self, q, k, v, mask):
        return attend(q, k, v, attn_mask=mask, scale=self.scale)


def both(args, scale=None, opset=None):
    model = Attend(scale)
    torch.onnx.export(model, args, "f.onnx", dynamo=True, verbose=False, opset_version=opset)
    session = onnxruntime.InferenceSession("f.onnx")
    feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
    return model(*args).numpy()[0, 0], session.run(None, feed)[0][0, 0]


torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 4, 8)
sees = torch.ones(4, 4, dtype=torch.bool).tril()
sees[2] = False  # query 2 sees no key
numbers = torch.zeros(4, 4).masked_fill(~sees, -torch.inf)
others, hidden = [0, 1, 3], {}
for name, mask in (("boolean", sees), ("numbers", numbers)):
    for opset in (None, 23):
        right, exported = both((q, k, v, mask), opset=opset)
        off, hidden[name, opset] = abs(exported - right)[others].max(), exported[2]
        print(f"mask {name}, opset {opset or 'default'}: torch {abs(right[2]).max():.2g}, exported {abs(exported[2]).max():.2g}; "
              f"other rows {off:.1e}")
        assert off < 1e-5 and not right[2].any()
    assert not hidden[name, 23].any()
np.testing.assert_allclose(hidden["boolean", None], v[0, 0].numpy().mean(0), rtol=1e-5)
assert np.isnan(hidden["numbers", None]).all()
right, exported = both((q, k, v, torch.zeros(4, 4)), scale=-0.3)
print(f"scale -0.3: torch {np.isnan(right).sum()} of 32 numbers NaN, exported {np.isnan(exported).sum()}")
assert np.isfinite(right).all() and np.isnan(exported).all()
PY
env/bin/python check.py
