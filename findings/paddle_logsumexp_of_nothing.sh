#!/usr/bin/env bash
# paddle 3.3.1 (CPU): paddle.logsumexp and paddle.logaddexp where all terms are -inf.
# Expected: -inf, the logarithm of 0, as NumPy, SciPy, PyTorch and JAX give: it is the log-sum-exp of a row of attention that sees no key,
#   and of a state before its first token.
# Instead: NaN, so that merging two parts of attention, one of which is empty, poisons the whole row.
# Seen when run:
#   logsumexp of a row with keys 2.3133, of one without nan
#   logaddexp(-inf, -inf) nan, NumPy -inf
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
number = lambda x: float(np.asarray(x).reshape(-1)[0])
hidden = paddle.full([1, 4], -np.inf)  # logits of a row that sees no key
seen = paddle.to_tensor([[1.0, 2.0, -np.inf, -np.inf]])
one, other = (number(paddle.logsumexp(x, axis=-1)) for x in (seen, hidden))
print(f"logsumexp of a row with keys {one:.4f}, of one without {other}")
both = number(paddle.logaddexp(*[paddle.to_tensor([-np.inf])] * 2))
print(f"logaddexp(-inf, -inf) {both}, NumPy {np.logaddexp(-np.inf, -np.inf)}")
assert np.isnan(other) and np.isnan(both) and abs(one - np.logaddexp(1, 2)) < 1e-6
PY
env/bin/python check.py 2>/dev/null
