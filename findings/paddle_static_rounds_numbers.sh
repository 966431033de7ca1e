#!/usr/bin/env bash
# paddle 3.3.1 (CPU): Python numbers beside float64 tensors in programs of paddle.jit.to_static, and in paddle.where.
# Expected: a Python number takes the dtype of the tensor beside it, as it does in eager products of Paddle itself and in all other libraries.
# Instead: recording a program rounds the number to float32 first. The result says float64, and is right to float32 only; paddle.where
#   does it without a program too. The eager function and its program differ in the eighth digit.
# Seen when run:
#   scaled: paddle.float64, the program is off the eager call by 1.5e-08
#   divided: paddle.float64, the program is off the eager call by 2.4e-08
#   power: paddle.float64, the program is off the eager call by 1.0e-09
#   where(…, x, 0.1) of float64, eager: 0.10000000149011612
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile paddlepaddle==3.3.1 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import numpy as np
import paddle

paddle.set_device("cpu")


def scaled(x):
    return x * 0.1


def divided(x):
    return x / 0.3


def power(x):
    return x**0.1


x = paddle.to_tensor(np.array([1.0, 2.0]))  # float64
for function in (scaled, divided, power):
    program = paddle.jit.to_static(function, full_graph=True)
    got, want = program(x), function(x)
    off = float(np.max(np.abs(got.numpy() - want.numpy())) / np.max(want.numpy()))
    print(f"{function.__name__}: {got.dtype}, the program is off the eager call by {off:.1e}")
    assert got.dtype == paddle.float64 and off > 1e-9
where = float(paddle.where(x > 10, x, 0.1).numpy()[0])
print("where(…, x, 0.1) of float64, eager:", where)
assert where != 0.1
PY
env/bin/python check.py 2>/dev/null
