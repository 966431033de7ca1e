#!/usr/bin/env bash
# tensorflow 2.21.0 (CPU): maxima of numbers among which is a NaN, under XLA.
# Expected: NaN, as eager tf.reduce_max and tf.maximum, tf.function, NumPy, PyTorch and JAX give: a softmax that subtracts the maximum,
#   or a test such as reduce_max(abs(gradients)) < 10, then shows that something is broken.
# Instead: with jit_compile=True the NaN is skipped, and the maximum is that of the other numbers. The test passes.
# Seen when run:
#   reduce_max of 1, NaN, 3: eager nan  tf.function nan  XLA 3.0
#   maximum of 2 and NaN: eager nan  XLA 2.0
#   'is the largest gradient below 10?' of gradients with a NaN: eager False  XLA True
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile tensorflow-cpu==2.21.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import numpy as np
import tensorflow as tf

x = np.array([1.0, np.nan, 3.0], np.float32)
eager, program = tf.reduce_max, tf.function(tf.reduce_max, jit_compile=True)
print("reduce_max of 1, NaN, 3: eager", float(eager(x)), " tf.function", float(tf.function(tf.reduce_max)(x)), " XLA", float(program(x)))
larger = tf.function(lambda a, b: tf.maximum(a, b), jit_compile=True)
print("maximum of 2 and NaN: eager", float(tf.maximum(2.0, np.nan)), " XLA", float(larger(tf.constant(2.0), tf.constant(np.nan))))
clipped = lambda x: tf.reduce_max(tf.abs(x)) < 10
print("'is the largest gradient below 10?' of gradients with a NaN: eager", bool(clipped(x)), " XLA", bool(tf.function(clipped, jit_compile=True)(x)))
assert np.isnan(eager(x)) and np.isnan(tf.function(tf.reduce_max)(x)) and float(program(x)) == 3
assert np.isnan(tf.maximum(2.0, np.nan)) and float(larger(tf.constant(2.0), tf.constant(np.nan))) == 2
assert not clipped(x) and tf.function(clipped, jit_compile=True)(x)
PY
CUDA_VISIBLE_DEVICES= env/bin/python check.py 2>/dev/null
