#!/usr/bin/env bash
# torch 2.13.0 beside NumPy 2.4.6, CPU, Python 3.11.
#
# Code that takes "a number of NumPy" writes isinstance(x, np.number | np.bool_), as linters advise since Python 3.10.
# One would expect a compiler that follows isinstance(x, int | float) and isinstance(x, (np.number, np.bool_)) to follow
# that too. torch.compile(fullgraph=True) does not: it evaluates `|` between two scalar classes of NumPy by itself, gets
# a TypeError that Python never raises there, and gives up ("Observed exception"). The union of Python's own types, a
# tuple of NumPy's, and the very union of NumPy's classes if it was made before the function runs, all compile. So a
# library that is fine in eager mode breaks the compiled models of its users by a line that changes nothing else.
# Without fullgraph there is a graph break, and no error.
#
# Seen:
#     int | float                     compiled
#     tuple of NumPy's classes        compiled
#     union of them, made before      compiled
#     union of them, in the function  Unsupported: Observed exception
#     the same function, eager        runs
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$work/env/bin/python" - <<'PY'
import numpy as np
import torch

UNION = np.number | np.bool_


def of_python(x):
    return x + isinstance(x.shape[0], int | float)


def of_a_tuple(x):
    return x + isinstance(x.shape[0], (np.number, np.bool_))


def made_before(x):
    return x + isinstance(x.shape[0], UNION)


def in_the_function(x):
    return x + isinstance(x.shape[0], np.number | np.bool_)


seen = {}
for function in (of_python, of_a_tuple, made_before, in_the_function):
    x = torch.zeros(3)
    function(x)  # eager: all four run
    try:
        torch.compile(function, fullgraph=True, backend="eager")(x)
        seen[function.__name__] = "compiled"
    except Exception as error:
        seen[function.__name__] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
for name, what in seen.items():
    print(f"{name:16} {what}")
*others, last = seen.values()
assert others == ["compiled"] * 3, seen
assert last == "Unsupported: Observed exception", seen
PY
