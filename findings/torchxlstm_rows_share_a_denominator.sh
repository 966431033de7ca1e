#!/usr/bin/env bash
# torchxlstm 0.0.3: mLSTM, the layer with a matrix memory of xLSTM.
# Expected: the memory of a head is a matrix, C = f C + i v k', the output C q is divided by max(|n' q|, 1), and the rows of a batch do not know
#   of each other.
# Instead: n.T @ q is written for arrays whose first axis is the batch, and sums over the rows of the batch: each row's output is divided by
#   a number made of all rows, in evaluation too, so it changes with its neighbours and with their number. The 1 of the maximum is taken for
#   an axis, and there is no floor. The memory is a vector, v k element by element, without a head. The "causal" convolution slides over
#   the channels of one token, not over tokens. sLSTM beside it keeps rows apart; shapes fit and nothing is raised.
# Seen when run (relative differences of what the layer adds to its input):
#   sLSTM: first row moves by 0.0e+00 with the other two, by 2.5e-07 without them; memory of three rows (3, 16), input of the convolution (3, 1,
#     16)
#   mLSTM: first row moves by 4.8e-01 with the other two, by 3.7e-01 without them; memory of three rows (3, 16), input of the convolution (3, 1,
#     32)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torchxlstm==0.0.3 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from torchxlstm import mLSTM, sLSTM

torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
for cls in (sLSTM, mLSTM):
    torch.manual_seed(0)
    layer = cls(16, 8, 2, batch_first=True).eval()
    shapes = []
    layer.layers[0].causal_conv.register_forward_hook(lambda module, args, result: shapes.append(tuple(args[0].shape)))
    x = torch.randn(3, 10, 16)
    other = torch.cat([x[:1], torch.randn(2, 10, 16)])
    added = lambda rows: (layer(rows)[0] - rows)[0]
    beside, alone = rel(added(other), added(x)), rel(added(x[:1]), added(x))
    memory = tuple(layer(x)[1][1][0].shape)
    print(f"{cls.__name__}: first row moves by {beside:.1e} with the other two, by {alone:.1e} without them; memory of three rows {memory}, input of the convolution {shapes[-1]}")
    assert max(beside, alone) < 1e-5 if cls is sLSTM else min(beside, alone) > 0.05
    assert memory == (3, 16) and shapes[-1][:2] == (3, 1)
PY
env/bin/python check.py
