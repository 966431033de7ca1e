#!/usr/bin/env bash
# array_api_compat 1.16.0, numpy 2.4.6: what `import array_api_compat.numpy` imports.
# Expected: a thin layer over a NumPy that is imported already: some milliseconds.
# Instead: the layer does `from numpy import *`, NumPy's `__all__` names its lazy submodules too, and so the star imports them all: f2py with
#   its Fortran parser, the test tools, typing, ctypeslib, … The layer then takes most of the time of NumPy itself, and array_namespace(x)
#   of a NumPy array, which imports it, pays for that at its first call.
# Seen when run:
#   array_api_compat.numpy imports 60 modules of NumPy, numpy.f2py, numpy.testing and numpy.typing among them
#   import time, in multiples of NumPy's own: 0.7 (not checked)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q array-api-compat==1.16.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import subprocess
import sys

CODE = """
import sys, time
start = time.perf_counter()
import numpy
middle = time.perf_counter()
before = set(sys.modules)
import array_api_compat.numpy
end = time.perf_counter()
new = {name for name in sys.modules if name.startswith("numpy.")} - before
print(len(new), {"numpy.f2py", "numpy.testing", "numpy.typing"} <= new, (end - middle) / (middle - start))
"""
subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True)  # byte code is written first
runs = [subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout.split() for _ in range(5)]
count, all_three, ratios = runs[0][0], runs[0][1], sorted(float(run[2]) for run in runs)
print(f"array_api_compat.numpy imports {count} modules of NumPy, numpy.f2py, numpy.testing and numpy.typing among them")
print(f"import time, in multiples of NumPy's own: {ratios[2]:.1f} (not checked)")
if all_three != "True":
    raise SystemExit("they are not imported any more")
PY
env/bin/python check.py
