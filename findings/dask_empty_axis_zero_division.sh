#!/usr/bin/env bash
# dask 2026.8.0: dask.array.zeros, ones, full with an axis of length 0.
# Expected: an array with no elements takes no memory and is valid (NumPy and the array API
#   standard allow it), so an empty batch of large items can be made like any other.
# Instead: ZeroDivisionError, as soon as the other axes alone would be above the automatic
#   chunk size. (2, 0, 3) is fine, (0, 512, 512, 512) is not; chunks=-1 avoids it.
#   dask.array.pad fails in the same way even for the small shape.
# Seen when run:
#   zeros (0, 512, 512, 512) ZeroDivisionError Original Message: float division by zero
#   ones (0, 512, 512, 512) ZeroDivisionError Original Message: float division by zero
#   full (0, 512, 512, 512) ZeroDivisionError Original Message: float division by zero
#   pad (2, 0, 3) ZeroDivisionError integer division or modulo by zero
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile "dask[array]==2026.8.0" numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import dask.array as da
import numpy as np

small, large = (2, 0, 3), (0, 512, 512, 512)
makers = {"zeros": da.zeros, "ones": da.ones, "full": lambda s, **kw: da.full(s, 1.0, **kw)}
for name, make in makers.items():
    assert make(small).compute().shape == small
    assert make(large, chunks=-1).compute().shape == np.zeros(large).shape == large
    try:
        make(large)
    except ZeroDivisionError as exc:
        print(name, large, "ZeroDivisionError", str(exc).splitlines()[-1][:60])
    else:
        raise SystemExit(name + " works now")
assert np.pad(np.zeros(small), 1).shape == (4, 2, 5)
try:
    da.pad(da.zeros(small), 1).compute()
except ZeroDivisionError as exc:
    print("pad", small, "ZeroDivisionError", exc)
else:
    raise SystemExit("pad works now")
PY
env/bin/python check.py
