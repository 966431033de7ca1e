#!/usr/bin/env bash
# jax 0.10.2 (CPU): jax.nn.dot_product_attention(local_window_size=(left, right)).
# Expected: a window of 16 keys makes the work and the memory linear in the length.
# Instead: the window is only a mask on the full query-by-key matrix: the compiled program
#   has the same temporary memory and as many operations as without a window, and both grow
#   16-fold when the length grows 4-fold.
# Seen when run:
#   full ['8 MiB, 72 Mflop', '128 MiB, 1158 Mflop']
#   window of 16 ['8 MiB, 77 Mflop', '128 MiB, 1225 Mflop']
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import jax
import jax.numpy as jnp


def cost(n, **kw):
    x = jax.ShapeDtypeStruct((1, n, 1, 16), jnp.float32)
    run = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **kw)).lower(x, x, x).compile()
    return run.memory_analysis().temp_size_in_bytes / 2**20, run.cost_analysis()["flops"] / 1e6


full, window = ([cost(n, **kw) for n in (1024, 4096)] for kw in ({}, {"local_window_size": (15, 0)}))
for name, rows in (("full", full), ("window of 16", window)):
    print(name, [f"{mib:.0f} MiB, {mflop:.0f} Mflop" for mib, mflop in rows])
assert window[1][0] > 0.9 * full[1][0] and window[1][1] > 0.9 * full[1][1]
assert window[1][0] > 12 * window[0][0] and window[1][1] > 12 * window[0][1]
PY
env/bin/python check.py
