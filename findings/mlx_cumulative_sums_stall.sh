#!/usr/bin/env bash
# mlx 0.32.4 (CPU): cumsum and logcumsumexp of bfloat16 and float16.
# Expected: what sum and logsumexp of the same array give: they are right in half precision to its last digit at 4096 terms, so a running sum
#   may be rounded when it is written, but not stand still.
# Instead: the running sum is kept in the dtype of the array. A sum of ones stands still at 256 in bfloat16 and at 2048 in float16, whatever
#   follows: decays that are summed in logarithms, as in gated linear attention, stop decaying.
# Seen when run (4096 terms):
#   bfloat16: sum of ones 4096, last of cumsum 256; logsumexp of zeros 8.31, last of logcumsumexp 4.16
#   float16: sum of ones 4096, last of cumsum 2048; logsumexp of zeros 8.32, last of logcumsumexp 6.24
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile "mlx[cpu]==0.32.4" numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import mlx.core as mx

n = 4096
for dtype, name, still in ((mx.bfloat16, "bfloat16", 256), (mx.float16, "float16", 2048)):
    ones, zeros = mx.ones(n, dtype=dtype), mx.zeros(n, dtype=dtype)
    total, last = ones.sum().item(), mx.cumsum(ones)[-1].item()
    whole, running = mx.logsumexp(zeros).item(), mx.logcumsumexp(zeros)[-1].item()
    print(f"{name}: sum of ones {total:g}, last of cumsum {last:g}; logsumexp of zeros {whole:.3g}, last of logcumsumexp {running:.3g}")
    assert total == n and last == still and abs(whole - 8.318) < 0.04 and abs(running - 8.318) > 0.5
PY
env/bin/python check.py
