#!/usr/bin/env bash
# tensorflow 2.21.0 (CPU): the gradient of tf.math.cumprod where one factor is 0, as a gate that is shut is.
# Expected: a product is differentiable everywhere: the gradient with respect to the factor that is 0 is the product of the others, as
#   tf.reduce_prod of the same numbers gives, and PyTorch and JAX.
# Instead: the gradient is made by a division by the factors, and where that is by 0 the answer is set to 0, without a word.
#   A shut gate can never open again by training.
# Seen when run (factors 2, 0, 3, 4):
#   last product: reduce_prod gradient [0, 24, 0, 0], cumprod gradient [0, 0, 0, 0]
#   sum of all products: by differences [1, 32, 0, 0], cumprod gradient [1, 0, 0, 0]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile tensorflow-cpu==2.21.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf

factors = tf.constant([2.0, 0.0, 3.0, 4.0], tf.float64)


def gradient(f):
    with tf.GradientTape() as tape:
        tape.watch(factors)
        y = f(factors)
    return tape.gradient(y, factors).numpy()


def differences(f, step=1e-3):
    eye = np.eye(4) * step
    return np.array([(f(factors.numpy() + e) - f(factors.numpy() - e)) / (2 * step) for e in eye]).round(6)


told = lambda g: [int(x) for x in np.rint(g)]
last, product = gradient(lambda x: tf.math.cumprod(x)[-1]), gradient(tf.reduce_prod)
total, exact = gradient(lambda x: tf.reduce_sum(tf.math.cumprod(x))), differences(lambda x: np.cumprod(x).sum())
print(f"last product: reduce_prod gradient {told(product)}, cumprod gradient {told(last)}")
print(f"sum of all products: by differences {told(exact)}, cumprod gradient {told(total)}")
assert told(product) == [0, 24, 0, 0] and told(last) == [0, 0, 0, 0]
assert told(exact) == [1, 32, 0, 0] and told(total) == [1, 0, 0, 0]
PY
env/bin/python check.py
