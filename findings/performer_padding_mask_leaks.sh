#!/usr/bin/env bash
# performer-pytorch 1.1.4: SelfAttention(...)(x, mask=mask).
# Expected: a key padding mask takes the padded positions out, so their content cannot
#   change the outputs of the real positions, and masking equals cutting them off.
# Instead: only the padded values are set to zero. The padded keys stay in the sum the output
#   is divided by, so outputs shrink, and they move when the padding's content changes.
# Seen when run:
#   other padding content: 0.37 relative; masked against cut off: 0.21
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile performer-pytorch==1.1.4 einops==0.8.2 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from performer_pytorch import SelfAttention

torch.manual_seed(0)
layer = SelfAttention(dim=64, heads=2, dim_head=32, causal=False).eval()
x = torch.randn(1, 16, 64)
other = x.clone()
other[:, 12:] = 5 * torch.randn(1, 4, 64)
mask = torch.arange(16)[None] < 12
with torch.no_grad():
    a, b = layer(x, mask=mask)[:, :12], layer(other, mask=mask)[:, :12]
    cut = layer(x[:, :12])
padding = ((a - b).norm() / a.norm()).item()
removed = ((a - cut).norm() / cut.norm()).item()
print(f"other padding content: {padding:.2f} relative; masked against cut off: {removed:.2f}")
assert padding > 0.05 and removed > 0.05
PY
env/bin/python check.py
