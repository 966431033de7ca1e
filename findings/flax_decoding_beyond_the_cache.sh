#!/usr/bin/env bash
# flax 0.12.8, jax 0.10.2: decode=True in flax.linen.MultiHeadDotProductAttention and flax.nnx.MultiHeadAttention, more tokens than the cache
#   was made for.
# Expected: an error at the first token that has no place, or at least a window over the last ones; the cache counts its tokens.
# Instead: the update of a slice that begins beyond the end is moved back to fit, so each further token replaces the last one in the cache, and
#   all places stay visible. The counter goes on beyond the length, nothing is raised under jit or without it, and the
#   output is that of no window at all: the first tokens and the newest one.
# Seen when run (cache of 4 tokens; largest difference from causal attention over all tokens, and over tokens 0, 1, 2 and the newest):
#   linen: tokens 0 to 3 1.8e-07, tokens 4 to 7 6.0e-01, against first three and newest 5.4e-07, counter 8
#   nnx: tokens 0 to 3 1.2e-07, tokens 4 to 7 2.0e+00, against first three and newest 4.8e-07, counter 8
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import jax
import jax.numpy as jnp
from flax import linen, nnx

x = jax.random.normal(jax.random.key(1), (1, 8, 8))
causal = linen.make_causal_mask(x[..., 0])


def check(name, full, step, count):
    """full: attention of x with a mask; step: attention of one more token beside the cache of 4"""
    decoded = jnp.concatenate([step(x[:, i : i + 1]) for i in range(8)], axis=1)
    right = full(causal)
    i, j = jnp.arange(8)[:, None], jnp.arange(8)
    crowded = full(((j <= i) & ((j < 3) | (j == i)))[None, None])

    def off(y, rows):
        return float(abs(decoded - y)[:, rows].max())

    first, later, seen = off(right, slice(4)), off(right, slice(4, 8)), off(crowded, slice(8))
    print(f"{name}: tokens 0 to 3 {first:.1e}, tokens 4 to 7 {later:.1e}, against first three and newest {seen:.1e}, counter {count()}")
    assert first < 1e-5 and later > 0.1 and seen < 1e-5 and count() == 8


decoder = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, decode=True)
variables = decoder.init(jax.random.key(0), jnp.ones((1, 4, 8)))
params, cache = {"params": variables["params"]}, variables["cache"]
apply = jax.jit(lambda cache, token: decoder.apply({**params, "cache": cache}, token, mutable=["cache"]))


def linen_step(token):
    global cache
    out, new = apply(cache, token)
    cache = new["cache"]
    return out


plain = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
check("linen", lambda mask: plain.apply(params, x, mask=mask), linen_step, lambda: int(cache["cache_index"]))

attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, qkv_features=8, decode=True, rngs=nnx.Rngs(0))
attention.init_cache((1, 4, 8))
check("nnx", lambda mask: attention(x, mask=mask, decode=False), attention, lambda: int(attention.cache_index[...]))
PY
env/bin/python check.py
