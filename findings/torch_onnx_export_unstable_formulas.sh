#!/usr/bin/env bash
# torch 2.13.0, onnxscript 0.7.2, onnxruntime 1.32.0: torch.onnx.export(dynamo=True) of the functions a gated recurrence is written in.
# Expected: logsigmoid, logaddexp, logcumsumexp, log1p and expm1 are chosen since they are accurate where the plain formulas fail; a file exported
#   from them is as accurate, or the export says that it has no such operator.
# Instead: each is written as the plain formula, log(sigmoid(x)), log(exp(a) + exp(b)), log(1 + x), exp(x) - 1, and logcumsumexp with one
#   maximum for the whole row. A closed forget gate has the logarithm -inf, a log-sum-exp of 100 is inf, a small step is 0. No warning is
#   given, and a comparison on ordinary inputs passes.
# Seen when run:
#   logsigmoid(-100): torch -100, exported -inf
#   logaddexp(100, 90): torch 100, exported inf
#   logcumsumexp(0, 200): torch [0, 200], exported [-inf, 200]
#   log1p(1e-08): torch 1e-08, exported 0
#   expm1(1e-08): torch 1e-08, exported 0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import logging
import warnings

import numpy as np
import onnxruntime
import torch
from torch.nn.functional import logsigmoid

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def both(function, *args):
    args = tuple(torch.tensor(a, dtype=torch.float32) for a in args)
    torch.onnx.export(Call(function), args, "f.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession("f.onnx")
    feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
    return function(*args).numpy(), session.run(None, feed)[0]


def text(x):
    return f"[{', '.join(f'{v:g}' for v in x)}]" if len(x) > 1 else f"{x[0]:g}"


def check(name, function, *args, wrong):
    right, exported = both(function, *args)
    print(f"{name}: torch {text(right)}, exported {text(exported)}")
    np.testing.assert_array_equal(exported, np.float32(wrong))
    assert np.isfinite(right).all() and np.any(right != exported)


ordinary = [-2.0, -0.5, 0.3, 1.5]
for function in (logsigmoid, lambda x: torch.logcumsumexp(x, 0), torch.expm1):
    np.testing.assert_allclose(*both(function, ordinary), rtol=1e-5)
check("logsigmoid(-100)", logsigmoid, [-100.0], wrong=[-np.inf])
check("logaddexp(100, 90)", torch.logaddexp, [100.0], [90.0], wrong=[np.inf])
check("logcumsumexp(0, 200)", lambda x: torch.logcumsumexp(x, 0), [0.0, 200.0], wrong=[-np.inf, 200])
check("log1p(1e-08)", torch.log1p, [1e-8], wrong=[0])
check("expm1(1e-08)", torch.expm1, [1e-8], wrong=[0])
PY
env/bin/python check.py
