#!/usr/bin/env bash
# tensorflow 2.21.0 (CPU): tf.math.cumulative_logsumexp and tf.cumsum of many terms.
# Expected: the last of the running values is what tf.reduce_logsumexp and tf.reduce_sum of the same numbers give, to the digits of the dtype.
# Instead: terms are added one by one in the dtype of the array. A running log-sum-exp of float32 is off in the third digit after a
#   million equal terms and by 0.69, a factor of two, after four millions; in bfloat16 running sums of ones stand still at 256, in float16
#   at 2048. So they do in tf.function; with jit_compile=True sums are right.
# Seen when run:
#   float32, 1024 zeros: cumulative_logsumexp 6.931, reduce_logsumexp 6.931, exact 6.931
#   float32, 1048576 zeros: cumulative_logsumexp 13.805, reduce_logsumexp 13.863, exact 13.863
#   float32, 4194304 zeros: cumulative_logsumexp 14.556, reduce_logsumexp 15.249, exact 15.249
#   bfloat16, 4096 ones: cumsum eager 256, tf.function 256, XLA 4096, reduce_sum 4096
#   float16, 4096 ones: cumsum eager 2048, tf.function 2048, XLA 4096, reduce_sum 4096
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile tensorflow-cpu==2.21.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import math

import tensorflow as tf

compiled = tf.function(tf.cumsum, jit_compile=True)
last = lambda x: float(x[-1])
for n in (2**10, 2**20, 2**22):
    zeros = tf.zeros(n)
    running, whole = last(tf.math.cumulative_logsumexp(zeros)), float(tf.reduce_logsumexp(zeros))
    print(f"float32, {n} zeros: cumulative_logsumexp {running:.3f}, reduce_logsumexp {whole:.3f}, exact {math.log(n):.3f}")
    assert abs(whole - math.log(n)) < 1e-4
    assert abs(running - whole) < 1e-4 if n == 2**10 else abs(running - whole) > (0.05 if n == 2**20 else 0.6)
n = 4096
for dtype, still in ((tf.bfloat16, 256), (tf.float16, 2048)):
    ones = tf.ones(n, dtype)
    eager, graph, xla, whole = last(tf.cumsum(ones)), last(tf.function(tf.cumsum)(ones)), last(compiled(ones)), float(tf.reduce_sum(ones))
    print(f"{dtype.name}, {n} ones: cumsum eager {eager:g}, tf.function {graph:g}, XLA {xla:g}, reduce_sum {whole:g}")
    assert eager == graph == still and xla == whole == n
PY
env/bin/python check.py
