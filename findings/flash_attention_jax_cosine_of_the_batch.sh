#!/usr/bin/env bash
# flash-attention-jax 0.3.1, jax 0.10.2 (CPU): cosine_sim_attention and cosine_sim_flash_attention.
# Expected: cosine attention: each query and each key is divided by its own length, so that a key equal to the query has the logit 10 (the scale), and
#   neither the number of tokens nor the other rows of a batch change it.
# Instead: queries are divided by one number, the length of the whole array with all tokens, heads and rows, and so are keys. Logits
#   shrink by the number of tokens: of some hundred keys each has nearly the same weight, so attention is the mean of the values. What a
#   row gets depends on the rows beside it, and on later tokens. The plain and the fast form have the same fault, so they agree.
# Seen when run (query equal to one of the keys):
#   4 tokens: weight of the equal key 1.0000 by the formula, plain 0.8170, fast 0.8170; output off the mean of the values by 1.3e+00
#   64 tokens: weight of the equal key 0.9938 by the formula, plain 0.0190, fast 0.0190; output off the mean of the values by 3.3e-02
#   512 tokens: weight of the equal key 0.9164 by the formula, plain 0.0020, fast 0.0020; output off the mean of the values by 3.2e-03
#   4 tokens beside a second row: first row moves by 8.0e-01
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile flash-attention-jax==0.3.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 einops==0.8.2 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import jax
from flash_attention_jax import cosine_sim_attention, cosine_sim_flash_attention
from jax import numpy as jnp

unit = lambda t: t / jnp.linalg.norm(t, axis=-1, keepdims=True)
rel = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
for n in (4, 64, 512):
    k, v = (jax.random.normal(key, (1, 1, n, 32)) for key in jax.random.split(jax.random.key(0)))
    mask, one_hot = jnp.ones((1, n), bool), jnp.zeros_like(v).at[:, :, 0].set(1)
    plain = cosine_sim_attention(k, k, one_hot, mask)[0, 0, 0, 0]
    fast = cosine_sim_flash_attention(k[0, 0], k[0, 0], one_hot[0, 0], mask[0])[0, 0]
    right = jax.nn.softmax(10 * unit(k)[0, 0, 0] @ unit(k)[0, 0].T)[0]
    mean = rel(cosine_sim_attention(k, k, v, mask), v.mean(2, keepdims=True) + 0 * v)
    weights = f"weight of the equal key {right:.4f} by the formula, plain {plain:.4f}, fast {fast:.4f}"
    print(f"{n} tokens: {weights}; output off the mean of the values by {mean:.1e}")
    assert right > 0.5 and abs(plain - fast) < 1e-4 and (n == 4 or max(plain, fast) < 0.05)
two = jnp.concatenate([k, 100 * k])  # a second row of larger vectors
few, values = two[:, :, :4], jnp.concatenate([v, v])[:, :, :4]
alone, beside = (cosine_sim_attention(few[:b], few[:b], values[:b], jnp.ones((b, 4), bool)) for b in (1, 2))
moved = rel(beside[:1], alone)
print(f"4 tokens beside a second row: first row moves by {moved:.1e}")
assert moved > 0.1
PY
env/bin/python check.py
