#!/usr/bin/env bash
# mambapy 1.2.0: mambapy.pscan.pscan(A, X), the parallel scan h_t = A_t h_(t-1) + X_t.
# Expected: a differentiable scan that takes complex A (as diagonal state spaces use) has
#   the complex gradient, or refuses.
# Instead: the forward pass is right for complex numbers, real gradients are right, but
#   complex gradients are silently wrong for both inputs: the hand-written backward leaves
#   out the conjugates.
# Seen when run:
#   torch.float64: forward 4e-16, gradient of A 9.5e-17, of X 7.7e-17
#   torch.complex128: forward 2e-16, gradient of A 1.4e+00, of X 5.9e-01
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile mambapy==1.2.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from mambapy.pscan import pscan


def loop(a, x):
    h, out = 0, []
    for t in range(a.shape[1]):
        h = a[:, t] * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


for dtype in (torch.float64, torch.complex128):
    torch.manual_seed(0)
    a = 0.5 * torch.randn(1, 9, 2, 3, dtype=dtype)
    x, w = torch.randn(2, 1, 9, 2, 3, dtype=dtype)
    a.requires_grad_(), x.requires_grad_()
    forward = (pscan(a, x) - loop(a, x)).abs().max().item()
    got, want = (torch.autograd.grad((w * f(a, x)).sum().abs(), (a, x)) for f in (pscan, loop))
    errs = [((g - r).norm() / r.norm()).item() for g, r in zip(got, want)]
    print(f"{dtype}: forward {forward:.0e}, gradient of A {errs[0]:.1e}, of X {errs[1]:.1e}")
    assert forward < 1e-12 and (min(errs) > 0.1 if dtype.is_complex else max(errs) < 1e-12)
PY
env/bin/python check.py
