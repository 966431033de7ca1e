#!/usr/bin/env bash
# paddle 3.3.1 (CPU): paddle.mean of a long float32 tensor.
# Expected: some units in the last place, as NumPy's pairwise sums give, and as paddle.sum gives in this very library.
# Instead: the mean of ten million equal numbers is off by 1 %, of a million by 0.1 %: the mean of a loss or of an error over a whole
#   array shows it, sum / n does not.
# Seen when run:
#   n = 100000: mean 0.099987, sum / n 0.100000, NumPy 0.100000
#   n = 1000000: mean 0.099910, sum / n 0.100000, NumPy 0.100000
#   n = 10000000: mean 0.101079, sum / n 0.100000, NumPy 0.100000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile paddlepaddle==3.3.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import numpy as np
import paddle

paddle.set_device("cpu")
for n in (10**5, 10**6, 10**7):
    x = paddle.full([n], 0.1, dtype="float32")
    mean, total, want = float(paddle.mean(x)), float(paddle.sum(x)), np.full(n, 0.1, np.float32).mean()
    print(f"n = {n}: mean {mean:.6f}, sum / n {total / n:.6f}, NumPy {want:.6f}")
    error = abs(mean - 0.1) / 0.1
assert error > 5e-3, error
assert abs(want - 0.1) < 1e-6
PY
env/bin/python check.py 2>/dev/null
