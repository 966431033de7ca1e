#!/usr/bin/env bash
# scikit-learn 1.9.1: Nystroem of float32 rows, some of which are equal (tokens, categories, small integers).
# Expected: with all rows as components the features reproduce the kernel, exactly in float64 and to about 1e-3 in float32, which it keeps as a
#   dtype; equal rows only make the basis singular, which a pseudo-inverse handles.
# Instead: singular values are cut off at 1e-12, a bound for float64. In float32 the null directions have values of 1e-7 made of rounding, and are
#   divided by the square root of it: products of the features are off by several times the largest value of the kernel, and a row's
#   similarity to itself, which is 1 for a Gaussian kernel, comes out as 4 or 11. Nothing is raised or warned.
# Seen when run:
#   distinct rows: float64 off by 1.5e-14, float32 off by 7.1e-06, largest self-similarity in float32 1.0
#   rows repeated 3 times: float64 off by 8.8e-10, float32 off by 3.2e+00, largest self-similarity in float32 4.2
#   rows of small integers: float64 off by 1.2e-09, float32 off by 9.8e+00, largest self-similarity in float32 10.8
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile scikit-learn==1.9.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import numpy as np
from sklearn.kernel_approximation import Nystroem
from sklearn.metrics.pairwise import rbf_kernel

rng = np.random.default_rng(0)


def check(name, rows):
    kernel = rbf_kernel(rows, gamma=0.1)
    off = []
    for dtype in (np.float64, np.float32):
        features = Nystroem(gamma=0.1, n_components=len(rows), random_state=0).fit_transform(rows.astype(dtype))
        assert features.dtype == dtype
        products = features.astype(np.float64) @ features.T.astype(np.float64)
        off.append(abs(products - kernel).max())
    print(f"{name}: float64 off by {off[0]:.1e}, float32 off by {off[1]:.1e}, "
          f"largest self-similarity in float32 {products.diagonal().max():.1f}")
    return off


double, single = check("distinct rows", rng.normal(size=(300, 8)))
assert double < 1e-6 and single < 1e-3
for name, rows in (("rows repeated 3 times", np.repeat(rng.normal(size=(100, 8)), 3, axis=0)),
                   ("rows of small integers", rng.integers(0, 3, size=(300, 4)).astype(float))):
    double, single = check(name, rows)
    assert double < 1e-6 and single > 0.5
PY
env/bin/python check.py
