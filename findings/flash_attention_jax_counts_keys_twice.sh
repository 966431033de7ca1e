#!/usr/bin/env bash
# flash-attention-jax 0.3.1, jax 0.10.2 (CPU): flash_attention and causal_flash_attention, more than 1024 keys that are no multiple of 1024.
# Expected: exact attention for every number of keys, as the plain attention of the same package gives, or an error.
# Instead: keys are read in slices of 1024, and a slice that would end beyond the array is moved back by JAX to fit: the last slice holds keys
#   of the one before again, which are counted twice, with their mask: 548 of 1500 keys, 1023 of 1025. Queries are sliced the same way: the
#   result of 1500 queries has 2048 rows. Lengths up to 1024 and multiples of it are right. Nothing is raised.
# Seen when run (one query, as in decoding, against plain attention; how often keys are counted):
#   1000 keys: off by 4.2e-07, causal 4.2e-07; keys before the last slice counted 1 times; 1000 queries give 1000 rows
#   1500 keys: off by 5.4e-01, causal 5.4e-01; keys before the last slice counted 2 times; 1500 queries give 2048 rows
#   2048 keys: off by 9.5e-07, causal 9.5e-07; keys before the last slice counted 1 times; 2048 queries give 2048 rows
#   2100 keys: off by 2.4e-01, causal 2.4e-01; keys before the last slice counted 2 times; 2100 queries give 3072 rows
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile flash-attention-jax==0.3.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 einops==0.8.2 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import jax
from flash_attention_jax import causal_flash_attention, flash_attention, plain_attention
from jax import numpy as jnp

for n in (1000, 1500, 2048, 2100):
    q, k, v = (jax.random.normal(key, (1, 1, m, 8)) for key, m in zip(jax.random.split(jax.random.key(0), 3), (1, n, n)))
    mask = jnp.ones((1, n), bool)
    right = plain_attention(q, k, v, mask)
    error, causal = (
        float(jnp.linalg.norm(y - right) / jnp.linalg.norm(right)) for y in (flash_attention(q, k, v, mask), causal_flash_attention(q, k, v))
    )
    # with equal logits: the weight of a part of the keys
    part = lambda a, b: float(flash_attention(0 * q, k, jnp.zeros_like(v).at[:, :, a:b].set(1), mask)[0, 0, 0, 0])
    last = n // 1024 * 1024
    times = part(n - 1024, last) / part(last, n) * (n - last) / (last - n + 1024) if 0 < last < n else 1.0
    rows = flash_attention(k, k, v, mask).shape[2]
    counted = f"keys before the last slice counted {times:.0f} times"
    print(f"{n} keys: off by {error:.1e}, causal {causal:.1e}; {counted}; {n} queries give {rows} rows")
    if n in (1000, 2048):
        assert error < 1e-5 and causal < 1e-5 and rows == n
    else:
        assert error > 0.05 and causal > 0.05 and round(times) == 2 and rows != n
PY
env/bin/python check.py
