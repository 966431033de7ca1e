#!/usr/bin/env bash
# performer-pytorch 1.1.4: softmax_kernel and linear_attention with the default eps=1e-4.
# Expected: a Monte Carlo estimate: 128 times as many random features, a much smaller error.
# Instead: for standard normal queries and keys of 64 columns the error stays at 0.81 from
#   256 to 32768 features, because the added 1e-4 is larger than nearly all features (they
#   are divided by their maximum first). The answer is nearly the plain average of the
#   values, which is why the error is that of the average. It looks stable, not wrong:
#   without the 1e-4 the error is far above 1.
# Seen when run:
#   average of the values: error 0.81
#   256 features: error 0.815, with eps=0 3.58
#   4096 features: error 0.807, with eps=0 2.56
#   32768 features: error 0.807, with eps=0 2.21
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile performer-pytorch==1.1.4 einops==0.8.2 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from performer_pytorch.performer_pytorch import gaussian_orthogonal_random_matrix, linear_attention, softmax_kernel

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 512, 64)
exact = (q @ k.mT / 8).softmax(-1) @ v
average = v.mean(2, keepdim=True).expand_as(v)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
print(f"average of the values: error {rel(average, exact):.2f}")
for m in (256, 4096, 32768):
    w = gaussian_orthogonal_random_matrix(m, 64)
    outs = []
    for eps in (1e-4, 0.0):
        phi = [softmax_kernel(x, projection_matrix=w, is_query=i, eps=eps) for x, i in ((q, True), (k, False))]
        outs.append(linear_attention(*phi, v))
    err, bare = (rel(o, exact) for o in outs)
    print(f"{m} features: error {err:.3f}, with eps=0 {bare:.2f}")
    assert 0.9 < err / rel(average, exact) < 1.1 and bare > 1.2
PY
env/bin/python check.py
