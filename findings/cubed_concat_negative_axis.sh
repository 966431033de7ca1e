#!/usr/bin/env bash
# cubed 0.27.0: cubed.array_api.concat with an axis counted from the end.
# Expected: axis=-1 is the last one, as in the array API standard and in NumPy.
# Instead: the check of shapes compares the axis with numbers from 0 on before it is normalised, so that arrays whose lengths differ
#   along the very axis of concatenation are refused; arrays of equal lengths pass, so that it is seen late.
# Seen when run:
#   axis=1  (2, 7)
#   axis=-1 ValueError all the input array dimensions except for the concatenation axis must match exactly: [(2, 3), (2, 4)]
#   axis=-1, equal lengths (2, 6)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile cubed==0.27.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import cubed.array_api as xp

x, y = xp.ones((2, 3)), xp.ones((2, 4))
print("axis=1 ", xp.concat([x, y], axis=1).shape)
try:
    xp.concat([x, y], axis=-1)
except ValueError as error:
    print("axis=-1 ValueError", error)
else:
    raise SystemExit("concat works now")
print("axis=-1, equal lengths", xp.concat([x, x], axis=-1).shape)
PY
env/bin/python check.py
