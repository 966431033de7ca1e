#!/usr/bin/env bash
# torch 2.13.0 (CPU), torch.nn.functional.scaled_dot_product_attention.
# Expected: a fused float32 kernel that keeps running sums per block, so one query over a
#   cache of 2**20 keys should be right to about 1e-6.
# Instead: the sums over the keys lose three digits, for values as wide as the query and
#   for narrower ones. The same float32 logits and values added in 1024 blocks of 1024 keys
#   are right to about 1e-7, so the loss is in the adding, not in the logits.
# Seen when run:
#   value columns 8: fused 1.6e-04, sums in blocks 1.4e-07
#   value columns 64: fused 2.1e-04, sums in blocks 1.3e-07
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
n = 2**20
q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, n, 64)
for width in (8, 64):
    v = torch.rand(1, 1, n, width)
    exact = (q[0, 0].double() @ k[0, 0].double().T / 8).softmax(-1) @ v[0, 0].double()
    fused = F.scaled_dot_product_attention(q, k, v)[0, 0]
    logits = (q[0, 0] @ k[0, 0].T)[0] / 8
    e = (logits - logits.max()).exp().view(1024, 1, 1024)
    blocks = (e @ v[0, 0].view(1024, 1024, width)).sum(0) / e.sum(-1).sum(0)
    err = [((x - exact).abs().max() / exact.abs().max()).item() for x in (fused, blocks)]
    print(f"value columns {width}: fused {err[0]:.1e}, sums in blocks {err[1]:.1e}")
    assert err[0] > 5e-5 and err[1] < 3e-6
PY
env/bin/python check.py
