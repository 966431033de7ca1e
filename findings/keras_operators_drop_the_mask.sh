#!/usr/bin/env bash
# keras 3.15.1 (TensorFlow backend, CPU): Embedding(mask_zero=True), an operator such as x * 2 or x + y, then GRU.
# Expected: the mask of the padding travels with the tensor to the recurrent layer, through elementwise operations as through Add, Activation
#   and Rescaling; a layer that drops it warns, as Lambda does.
# Instead: *, +, keras.ops.tanh and slicing drop the mask without a warning, and the recurrence runs on over the padding. The layer that
#   does the same, Add()([x, x]) for x + x, keeps it. Scaling embeddings by a number or adding positions by +
#   makes a row's result depend on the longest row of its batch.
# Seen when run (row of three tokens padded to five, relative difference from it alone):
#   x: 1.3e-07, no warning
#   Rescaling(2)(x): 2.2e-08, no warning
#   Add()([x, x]): 2.2e-08, no warning
#   Activation('tanh')(x): 1.2e-07, no warning
#   Lambda(…)(x): 7.9e-01, a warning
#   x * 2: 7.9e-01, no warning
#   x + x: 7.9e-01, no warning
#   ops.tanh(x): 8.8e-01, no warning
#   x[:, :, :2]: 4.6e-01, no warning
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile keras==3.15.1 tensorflow-cpu==2.21.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"
import warnings

import keras
import numpy as np
from keras import layers, ops

ids = np.array([[1, 2, 3, 0, 0], [1, 2, 3, 4, 1]])


def check(name, operation):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((None,), dtype="int32")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        x = layers.Embedding(5, 4, mask_zero=True, embeddings_initializer="normal")(inputs)
        model = keras.Model(inputs, layers.GRU(4, kernel_initializer=keras.initializers.RandomNormal(stddev=10.0))(operation(x)))
        padded, alone = (ops.convert_to_numpy(model(x))[0] for x in (ids, ids[:1, :3]))
    error, warned = np.linalg.norm(padded - alone) / np.linalg.norm(alone), any("mask" in str(w.message) for w in seen)
    print(f"{name}: {error:.1e}, {'a warning' if warned else 'no warning'}")
    return error, warned


for name, operation in (
    ("x", lambda x: x),
    ("Rescaling(2)(x)", layers.Rescaling(2.0)),
    ("Add()([x, x])", lambda x: layers.Add()([x, x])),
    ("Activation('tanh')(x)", layers.Activation("tanh")),
):
    error, warned = check(name, operation)
    assert error < 1e-5 and not warned
error, warned = check("Lambda(…)(x)", layers.Lambda(lambda x: x * 2))
assert error > 0.1 and warned
for name, operation in (
    ("x * 2", lambda x: x * 2), ("x + x", lambda x: x + x), ("ops.tanh(x)", ops.tanh), ("x[:, :, :2]", lambda x: x[:, :, :2]),
):
    error, warned = check(name, operation)
    assert error > 0.1 and not warned
PY
env/bin/python check.py
