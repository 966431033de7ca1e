#!/usr/bin/env bash
# nystrom-attention 0.0.14: NystromAttention on a batch of two sequences.
# Expected: in evaluation mode a sequence's output does not depend on the other sequences of
#   the batch, up to rounding.
# Instead: the iterative pseudo-inverse starts from one number, a maximum over the whole
#   batch and all heads. With the default six steps it has not converged, so the start
#   shows: scaling the second sequence changes the first one's output.
# Seen when run:
#   second sequence times 0.0: first output moves by 0.0000 relative
#   second sequence times 1.0: first output moves by 0.0000 relative
#   second sequence times 10.0: first output moves by 0.1874 relative
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile nystrom-attention==0.0.14 einops==0.8.2 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from nystrom_attention import NystromAttention

torch.manual_seed(0)
layer = NystromAttention(dim=64, dim_head=32, heads=2, num_landmarks=16, residual=False).eval()
x = torch.randn(2, 128, 64)
with torch.no_grad():
    layer.to_qkv.weight.copy_(torch.randn_like(layer.to_qkv.weight) / 8)
    alone = layer(x[:1])
    for scale in (0.0, 1.0, 10.0):
        pair = layer(torch.cat([x[:1], scale * x[1:]]))[:1]
        moved = ((pair - alone).norm() / alone.norm()).item()
        print(f"second sequence times {scale}: first output moves by {moved:.4f} relative")
    twice = layer(x[:1].expand(2, -1, -1))[:1]
assert moved > 0.05 and torch.allclose(twice, alone, atol=1e-5)
PY
env/bin/python check.py
