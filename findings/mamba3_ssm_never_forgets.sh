#!/usr/bin/env bash
# mamba3-ssm 0.2.1: Mamba3, the layer, as it is made by default.
# Expected: the decay of the state is exp(A dt) with an A that is made from the input, negative and at most -1e-4: each head forgets, and how fast it
#   does is learned and depends on the token; that is the selection of a selective state space.
# Instead: the bound is applied to softplus(a), before the sign is turned, and as it is below all that softplus can be, A is +1e-4 for every token and
#   head, whatever the weights. The state never decays, it grows by a hair; the projection that A is made of has no influence and no
#   gradient. step() has the same fault, so decoding agrees with the pass, and the loss still falls.
# Seen when run:
#   A, made from 64 different tokens: from 0.000100 to 0.000100
#   gradient of its projection 0.0e+00, of that of dt 3.3e+02
#   another projection for A: outputs move by 0.0e+00
#   state after 1000 tokens that write nothing: 1.006 of what it was
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile mamba3-ssm==0.2.1 torch==2.13.0 numpy==2.4.6 einops==0.8.2 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import importlib

import torch
from mamba3_ssm import Mamba3

torch.manual_seed(0)
layer = Mamba3(d_model=16, d_state=16, headdim=8, expand=2)
heads = layer.nheads
first = layer.in_proj.weight.shape[0] - layer.num_rope_angles - 2 * heads  # rows of A: after those of dt, before trap and angles
rows = slice(first, first + heads)
x = torch.randn(1, 64, 16)

module = importlib.import_module("mamba3_ssm.layer")
seen, scan = [], module.ssm_scan_siso
module.ssm_scan_siso = lambda **p: (seen.append((p["ADT"] / p["DT"]).detach()), scan(**p))[1]
y = layer(x)
y.square().sum().backward()
gradient = layer.in_proj.weight.grad
A, = seen
print(f"A, made from 64 different tokens: from {A.min():.6f} to {A.max():.6f}")
print(f"gradient of its projection {gradient[rows].abs().max():.1e}, of that of dt {gradient[first - heads : first].abs().max():.1e}")
with torch.no_grad():
    layer.in_proj.weight[rows] = 5 * torch.randn(heads, 16)
    moved = ((layer(x) - y).norm() / y.norm()).item()
    print(f"another projection for A: outputs move by {moved:.1e}")
    states = layer.allocate_inference_cache(1)
    _, *states = layer.step(x[:, 0], *states)
    layer.in_proj.weight[layer.d_inner : 2 * layer.d_inner] = 0  # from here on nothing is written
    for i in range(1, 1001):
        _, *states = layer.step(x[:, i % 64], *states)
        if i == 1:
            start = states[1].norm()
    left = (states[1].norm() / start).item()
    print(f"state after 1000 tokens that write nothing: {left:.3f} of what it was")
assert A.min() > 0 and moved == 0 and not gradient[rows].any() and gradient[first - heads : first].any() and left >= 1
PY
env/bin/python check.py
