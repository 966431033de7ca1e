#!/usr/bin/env bash
# LRU-pytorch 0.1.3: LRU(...)(x, state=s), x a batch of several sequences.
# Expected: a state handed in is where the sequences begin, each row its own one or all of them the same, as in nn.LSTM and nn.GRU; a state of the
#   wrong shape is refused.
# Instead: rows are run one after the other and the state is set to zeros after each, so the state is used for the first row alone and all others
#   begin from nothing. A state with a row for each sequence, as PyTorch's recurrent layers take it, is refused. Without a state, and for one
#   sequence without a batch axis, the layer is right, so a check on one sequence passes.
# Seen when run (two equal rows, continued from the state after eight tokens, relative difference from one pass):
#   one sequence: 1.2e-07
#   batch of two equal ones: row 0 1.2e-07, row 1 4.6e-01; without a state 0.0e+00
#   a state for each row: RuntimeError mat1 and mat2 shapes cannot be multiplied (4x8 and 2x8)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile LRU-pytorch==0.1.3 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from LRU_pytorch import LRU

torch.set_grad_enabled(False)
torch.manual_seed(0)
layer = LRU(in_features=4, out_features=4, state_features=8, rmin=0.9, rmax=0.99)
x = torch.randn(16, 4)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
whole = layer(x)
# the state after eight tokens, from the formulas of the layer
size, phase = torch.exp(-torch.exp(layer.nu_log)), torch.exp(layer.theta_log)
decay, state = torch.polar(size, phase), torch.zeros(8, dtype=torch.complex64)
for token in x[:8]:
    state = decay * state + torch.exp(layer.gamma_log) * (layer.B @ token.to(layer.B.dtype))
one = rel(layer(x[8:], state=state), whole[8:])
rows = layer(x[8:].expand(2, 8, 4), state=state)
errors = [rel(row, whole[8:]) for row in rows]
plain = max(rel(row, whole) for row in layer(x.expand(2, 16, 4)))
print(f"one sequence: {one:.1e}")
print(f"batch of two equal ones: row 0 {errors[0]:.1e}, row 1 {errors[1]:.1e}; without a state {plain:.1e}")
assert max(one, errors[0], plain) < 1e-5 and errors[1] > 0.1
try:
    many = rel(layer(x[8:].expand(2, 8, 4), state=state.expand(2, 8))[1], whole[8:])
    print(f"a state for each row: row 1 {many:.1e}")
except RuntimeError as e:
    many = 1.0
    print("a state for each row: RuntimeError", str(e)[:60])
assert many > 0.1
PY
env/bin/python check.py
