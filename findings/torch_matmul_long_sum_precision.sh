#!/usr/bin/env bash
# torch 2.13.0 (CPU), float32 matmul with a long contracted axis.
# Expected: ones @ x is a common way to sum over positions, and a blocked matrix product
#   keeps several partial sums, so it should be about as good as x.sum().
# Instead: with few rows or columns the product adds term after term into one float32
#   number: summing 2**20 copies of 0.1 is off by 1 %, where x.sum() and x.cumsum() are
#   right to 2e-7. Batching over 1024 blocks and adding the parts repairs it.
# Seen when run:
#   {'x @ ones': '9.9e-03', '64 rows @ ones': '9.9e-03', 'sum': '1.5e-07', 'cumsum': '0.0e+00',
#     'blocks': '9.5e-06'}
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch

n = 2**20
x = torch.full((1, n), 0.1)
true = x.double().sum().item()
ones = torch.ones(n, 8)
got = {
    "x @ ones": (x @ ones)[0, 0],
    "64 rows @ ones": (x.expand(64, -1) @ ones)[0, 0],
    "sum": x.sum(),
    "cumsum": x.cumsum(1)[0, -1],
    "blocks": (x.view(1024, 1, 1024) @ ones.view(1024, 1024, 8)).sum(0)[0, 0],
}
err = {name: abs(value.item() / true - 1) for name, value in got.items()}
print({name: f"{value:.1e}" for name, value in err.items()})
assert err["x @ ones"] > 1e-3 and err["64 rows @ ones"] > 1e-3
assert err["sum"] < 1e-5 and err["cumsum"] < 1e-5 and err["blocks"] < 1e-4
PY
env/bin/python check.py
