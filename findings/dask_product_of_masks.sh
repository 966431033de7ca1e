#!/usr/bin/env bash
# dask 2026.8.0 beside NumPy 2.4.6: the product of Boolean matrices (x @ y, and dask.array.dot, tensordot and einsum).
# Expected: Boolean, as NumPy gives it, "is there a path": masks of attention of two layers are joined so, and inverted for what is hidden.
# Instead: the parts that chunks give are Boolean and are then added as integers, so the result is in how many chunks of the shared axis there
#   is a path: neither a mask nor a count, and other numbers with other chunks. x @ y is Boolean where there is but one chunk, as in
#   a small test. `~` of integers is not 0 here: with where(~reached, -inf, 0) every pair is hidden, without a word.
# Seen when run (a causal mask of four tokens times itself):
#   NumPy: bool, last row [True, True, True, True], 6 pairs hidden
#   chunks of 4: @ bool, last row [True, True, True, True], 6 pairs hidden
#   chunks of 4: dot int64, last row [1, 1, 1, 1], 16 pairs hidden
#   chunks of 2: @ int64, last row [2, 2, 1, 1], 16 pairs hidden
#   chunks of 2: dot int64, last row [2, 2, 1, 1], 16 pairs hidden
#   chunks of 1: @ int64, last row [4, 3, 2, 1], 16 pairs hidden
#   chunks of 1: dot int64, last row [4, 3, 2, 1], 16 pairs hidden
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile "dask[array]==2026.8.0" numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import dask.array as da
import numpy as np

mask = np.tril(np.ones((4, 4), bool))


def check(name, product, where=np.where):
    values, hidden = np.asarray(product), np.isinf(np.asarray(where(~product, -np.inf, 0.0))).sum()
    print(f"{name} {product.dtype}, last row {values[-1].tolist()}, {hidden} pairs hidden")
    assert values.dtype == product.dtype
    return product.dtype, values[-1].tolist(), hidden


right = check("NumPy:", mask @ mask)
assert right == (np.bool_, [True] * 4, 6)
for chunks, row in ((4, [1, 1, 1, 1]), (2, [2, 2, 1, 1]), (1, [4, 3, 2, 1])):
    lazy = da.from_array(mask, chunks=chunks)
    wrong = np.int64, row, 16
    assert check(f"chunks of {chunks}: @", lazy @ lazy, da.where) == (right if chunks == 4 else wrong)
    for function in (da.dot, lambda x, y: da.tensordot(x, y, 1), lambda x, y: da.einsum("ij,jk->ik", x, y)):
        product = function(lazy, lazy)
        assert product.dtype == np.int64 and np.asarray(product)[-1].tolist() == row
    assert check(f"chunks of {chunks}: dot", da.dot(lazy, lazy), da.where) == wrong
PY
env/bin/python check.py
