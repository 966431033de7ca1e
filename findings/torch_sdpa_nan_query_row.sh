#!/usr/bin/env bash
# torch 2.13.0 (CPU), torch.nn.functional.scaled_dot_product_attention.
# Expected: a query row of NaN gives a NaN output row (softmax of NaN logits), so that a
#   fault upstream stays visible.
# Instead: with few keys (fewer than one vector register holds) the row comes out as plain
#   zeros; with many keys it is NaN, as is softmax(q k^T) v written out for either length.
# Seen when run:
#   3 keys: fused row [0.0, 0.0, 0.0], written out [nan, nan, nan]
#   7 keys: fused row [0.0, 0.0, 0.0], written out [nan, nan, nan]
#   64 keys: fused row [nan, nan, nan], written out [nan, nan, nan]
#   65 keys: fused row [nan, nan, nan], written out [nan, nan, nan]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
for n in (3, 7, 64, 65):
    q, k, v = torch.randn(1, 1, 2, 16), torch.randn(1, 1, n, 16), torch.randn(1, 1, n, 16)
    q[..., 0, :] = float("nan")
    fused = F.scaled_dot_product_attention(q, k, v)[0, 0]
    plain = ((q @ k.mT / 4).softmax(-1) @ v)[0, 0]
    print(f"{n} keys: fused row {fused[0, :3].tolist()}, written out {plain[0, :3].tolist()}")
    assert plain[0].isnan().all() and fused[1].isfinite().all()
    assert (fused[0] == 0).all() if n < 8 else fused[0].isnan().all()
PY
env/bin/python check.py
