#!/usr/bin/env bash
# jax 0.10.2: jax.nn.dot_product_attention with a query that may see no key.
# Expected: zeros (as torch gives) or NaN; in no case values the mask forbids.
# Instead: three answers in one function. A boolean mask, or key_value_seq_lengths=0, gives
#   the plain average of all the hidden values; the same mask as a bias of 0 and -inf gives
#   NaN; a row at or beyond query_seq_lengths gives 0.
# Seen when run:
#   {'mask': [-0.35200002789497375, -0.3930000066757202], 'no keys': [-0.35200002789497375,
#     -0.3930000066757202], 'bias': [nan, nan], 'beyond': [-0.0, -0.0]}
#   average of the hidden values [-0.35200002789497375, -0.3930000066757202]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

attend = jax.nn.dot_product_attention
rng = np.random.default_rng(0)
q, k, v = (jnp.array(rng.normal(size=(1, 8, 2, 16)), jnp.float32) for _ in range(3))
mask = jnp.ones((1, 1, 8, 8), bool).at[..., 3, :].set(False)
average = v[0].mean(0)
rows = {
    "mask": attend(q, k, v, mask=mask)[0, 3],
    "no keys": attend(q, k, v, key_value_seq_lengths=jnp.array([0]))[0, 3],
    "bias": attend(q, k, v, bias=jnp.where(mask, 0.0, -jnp.inf))[0, 3],
    "beyond": attend(q, k, v, query_seq_lengths=jnp.array([3]))[0, 3],
}
print({name: np.round(row[0, :2], 3).tolist() for name, row in rows.items()})
print("average of the hidden values", np.round(average[0, :2], 3).tolist())
assert abs(rows["mask"] - average).max() < 1e-6 and abs(rows["no keys"] - average).max() < 1e-6
assert jnp.isnan(rows["bias"]).all() and (rows["beyond"] == 0).all()
PY
env/bin/python check.py
