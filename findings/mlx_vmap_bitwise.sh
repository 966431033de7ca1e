#!/usr/bin/env bash
# mlx 0.32.4: vmap of a & b, a | b and a ^ b where only the right operand is mapped.
# Expected: a constant mask combined with a mapped one, as causal & padding, gives one result for each item, as where, +, == and
#   logical_and of MLX do, and as jax.vmap does.
# Instead: if the constant has fewer axes than the mapped array, the result has one item, that of the first, and its axis is as
#   long as 1, so it broadcasts over the batch without a word: every item gets the mask of the first one. With the
#   operands exchanged the result is right.
# Seen when run:
#   mask & x: (1, 3, 4, 5)   x & mask: (2, 3, 4, 5)   logical_and: (2, 3, 4, 5)
#   attention of two items, the second with its own padding: item 0 off by 0.0, item 1 off by 3.0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile "mlx[cpu]==0.32.4" numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import mlx.core as mx
import numpy as np

rng = np.random.default_rng(0)
x = mx.array(rng.random((2, 3, 4, 5)) < 0.5)
mask = mx.array([[True], [False], [True], [False]])
shapes = {
    "mask & x": mx.vmap(lambda x: mask & x)(x).shape,
    "x & mask": mx.vmap(lambda x: x & mask)(x).shape,
    "logical_and": mx.vmap(lambda x: mx.logical_and(mask, x))(x).shape,
}
print("   ".join(f"{name}: {shape}" for name, shape in shapes.items()))

n = 6
causal = mx.tril(mx.ones((n, n))) > 0
q = mx.array(rng.standard_normal((2, 4, n, 8)), dtype=mx.float32)  # 2 items of 4 heads
keep = mx.array([[True] * n, [False] * 3 + [True] * (n - 3)])


def attend(q, keep):
    keep = mx.broadcast_to(keep[None, None], (4, 1, n))
    seen = causal & keep
    return mx.softmax(mx.where(seen, q @ mx.swapaxes(q, -1, -2), -1e9), axis=-1) @ q


alone = [attend(q[i], keep[i]) for i in range(2)]
mapped = mx.vmap(attend)(q, keep)
off = [float(mx.abs(mapped[i] - alone[i]).max()) for i in range(2)]
print(f"attention of two items, the second with its own padding: item 0 off by {off[0]:.1f}, item 1 off by {off[1]:.1f}")
assert shapes["mask & x"] == (1, 3, 4, 5) and shapes["x & mask"] == shapes["logical_and"] == (2, 3, 4, 5)
assert off[0] == 0 and off[1] > 0.1
PY
env/bin/python check.py
