#!/usr/bin/env bash
# jax 0.10.2 (CPU) beside NumPy 2.4.6: the running sum of probabilities, float32.
# Expected: a running sum of numbers that are not negative never decreases: one that adds term by term cannot, since rounding keeps order. Drawing
#   from a distribution by searchsorted(cumsum(p), u) and nucleus sampling by cumsum(p) < 0.9 lean on it.
# Instead: jnp.cumsum and jax.lax.associative_scan add in a tree, and neighbouring sums take different ways through it: at some places in
#   ten thousand the sum after a term is smaller than the one before it. The array is not sorted, though all terms are positive, and
#   `cumsum(p) < bound` leaves out a term and keeps the next one. (The tree is the more exact one: its errors are smaller, but not ordered.)
# Seen when run (softmax of 50000 normal logits):
#   numpy: 0 steps down, largest error 3.9e-05
#   jnp.cumsum: 65 steps down, largest error 1.8e-07
#   associative_scan: 218 steps down, largest error 2.1e-07
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile jax==0.10.2 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

logits = np.random.default_rng(0).standard_normal(50000) * 3
p = np.exp(logits - logits.max())
p = (p / p.sum()).astype(np.float32)
assert p.min() > 0
sums = {
    "numpy": np.cumsum(p),
    "jnp.cumsum": np.asarray(jnp.cumsum(jnp.asarray(p))),
    "associative_scan": np.asarray(jax.lax.associative_scan(jnp.add, jnp.asarray(p))),
}
exact = np.cumsum(p, dtype=np.float64)
for name, total in sums.items():
    down = int((np.diff(total) < 0).sum())
    print(f"{name}: {down} steps down, largest error {np.abs(total - exact).max():.1e}")
    assert down == 0 if name == "numpy" else down >= 10
PY
JAX_PLATFORMS=cpu env/bin/python check.py
