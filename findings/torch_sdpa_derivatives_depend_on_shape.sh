#!/usr/bin/env bash
# torch 2.13.0 (CPU), torch.nn.functional.scaled_dot_product_attention.
# Expected: a core function made of matmul and softmax has forward-mode and second
#   derivatives, or lacks them for every input.
# Instead: torch.func.jvp and a gradient of a gradient both raise for ordinary four-axis
#   inputs with values as wide as the queries; drop one column of the values (or one axis of
#   each input) and both work, because another code path is taken.
# Seen when run:
#   forward same width: NotImplementedError Trying to use forward AD with
#     _scaled_dot_product_flash_attention_for_
#   forward one value column fewer, or three axes: works
#   twice same width: RuntimeError derivative for
#     aten::_scaled_dot_product_flash_attention_for_cpu_backw
#   twice one value column fewer, or three axes: works
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
q, k, v = torch.randn(3, 1, 1, 8, 16, dtype=torch.float64)


def twice(q, k, v):
    q = q.clone().requires_grad_()
    (g,) = torch.autograd.grad((F.scaled_dot_product_attention(q, k, v) ** 2).sum(), q, create_graph=True)
    return torch.autograd.grad(g.sum(), q)[0]


def forward(q, k, v):
    return torch.func.jvp(F.scaled_dot_product_attention, (q, k, v), (q, k, v))[1]


for what, error in ((forward, NotImplementedError), (twice, RuntimeError)):
    try:
        what(q, k, v)
    except error as exc:
        print(what.__name__, "same width:", type(exc).__name__, str(exc)[:70])
    else:
        raise SystemExit("it works now")
    assert what(q, k, v[..., :-1]).isfinite().all() and what(q[0], k[0], v[0]).isfinite().all()
    print(what.__name__, "one value column fewer, or three axes: works")
PY
env/bin/python check.py
