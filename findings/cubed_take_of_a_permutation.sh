#!/usr/bin/env bash
# cubed 0.27.0: cubed.array_api.take by as many indices as there are rows, and along an axis counted from the end.
# Expected: the rows in the order of the indices, and axis=-1 is the last one, as in the array API standard and in NumPy.
# Instead: as many indices as rows are taken for all rows in their own order, whatever they are: a permutation does nothing, and repeated
#   indices give each row once. And axis=-1 takes along the first axis. Nothing is raised: sorting, packing and gathering by take give
#   other numbers. (Fewer indices than rows, along axes counted from the front, are right.)
# Seen when run:
#   rows 3 2 1 0: [0.0, 1.0, 2.0, 3.0] where NumPy has [3.0, 2.0, 1.0, 0.0]
#   rows 3 0 0 2: [0.0, 1.0, 2.0, 3.0] where NumPy has [3.0, 0.0, 0.0, 2.0]
#   rows 3 1: [3.0, 1.0] where NumPy has [3.0, 1.0]
#   columns 1 3, axis=-1: shape (2, 6) where NumPy has (4, 2)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile cubed==0.27.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import cubed.array_api as xp
import numpy as np

x = np.arange(4.0)
lazy = xp.asarray(x, chunks=2)
seen = []
for rows in ([3, 2, 1, 0], [3, 0, 0, 2], [3, 1]):
    got, expected = xp.take(lazy, xp.asarray(np.array(rows)), axis=0).compute().tolist(), np.take(x, rows).tolist()
    print(f"rows {' '.join(map(str, rows))}: {got} where NumPy has {expected}")
    seen.append(got == expected)
m = np.arange(24.0).reshape(4, 6)
columns = xp.take(xp.asarray(m, chunks=(2, 4)), xp.asarray(np.array([1, 3])), axis=-1).compute()
print(f"columns 1 3, axis=-1: shape {columns.shape} where NumPy has {np.take(m, [1, 3], axis=-1).shape}")
if seen != [False, False, True] or columns.shape != (2, 6):
    raise SystemExit("take differs now")
PY
env/bin/python check.py
