#!/usr/bin/env bash
# performer-pytorch 1.1.4: FastAttention(causal=True).
# Expected: causal attention: changing the last key cannot change an earlier output.
# Instead: the keys' features are divided by exp of a maximum over the whole sequence before
#   a fixed 1e-4 is added, so one large late key pushes all earlier keys down to that floor.
# Seen when run:
#   last key times 1.0: earlier outputs move by 0.000 relative
#   last key times 3.0: earlier outputs move by 0.160 relative
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile performer-pytorch==1.1.4 einops==0.8.2 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from performer_pytorch import FastAttention

torch.manual_seed(0)
layer = FastAttention(dim_heads=64, nb_features=256, causal=True)
q, k, v = torch.randn(3, 1, 2, 256, 64)
base = layer(q, k, v)[:, :, :-1]
for factor in (1.0, 3.0):
    later = k.clone()
    later[:, :, -1] *= factor
    moved = ((layer(q, later, v)[:, :, :-1] - base).norm() / base.norm()).item()
    print(f"last key times {factor}: earlier outputs move by {moved:.3f} relative")
    assert moved == 0 if factor == 1 else moved > 0.02
PY
env/bin/python check.py
