#!/usr/bin/env bash
# gguf 0.19.0: quantising small weights, blocks of 1e-5 and below.
# Expected: each block has its own scale, so what is lost is relative to the block: half a per cent in Q8_0 and eight per cent in Q4_0,
#   whatever the size of the weights, and more bits are never worse.
# Instead: the scale itself is a float16, and that of Q8_0 is a 127th of the block's largest weight: below 8e-3 it is subnormal and loses
#   bits, one by one. At weights of 1e-5 eight bits are worse than four (Q4_0 divides by 8 only), at 1e-6 all is 0, without a word. A
#   low-rank update, or a matrix whose size was moved into its neighbour, can be that small; multiplied by a power of two before and divided
#   after, it keeps its half per cent. At the other end, weights of 1e7 come back as inf or NaN.
# Seen when run (relative error of normal weights, by their size):
#   1: Q8_0 5.3e-03, Q5_0 4.3e-02, Q4_0 8.6e-02, BF16 1.7e-03
#   0.001: Q8_0 5.4e-03, Q5_0 4.3e-02, Q4_0 8.6e-02, BF16 1.7e-03
#   0.0001: Q8_0 1.1e-02, Q5_0 4.3e-02, Q4_0 8.6e-02, BF16 1.7e-03
#   1e-05: Q8_0 9.4e-02, Q5_0 4.4e-02, Q4_0 8.6e-02, BF16 1.7e-03
#   3e-06: Q8_0 2.2e-01, Q5_0 5.8e-02, Q4_0 8.8e-02, BF16 1.7e-03
#   1e-06: Q8_0 1.0e+00, Q5_0 1.2e-01, Q4_0 1.1e-01, BF16 1.7e-03
#   1e-05, times 2 ** 16 before and divided after: Q8_0 5.3e-03
#   1e7: 0% of the weights in Q8_0 are numbers
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile gguf==0.19.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

w = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
kinds = Type.Q8_0, Type.Q5_0, Type.Q4_0, Type.BF16
off = {}
for size in (1, 1e-3, 1e-4, 1e-5, 3e-6, 1e-6):
    x = w * np.float32(size)
    for kind in kinds:
        off[kind, size] = np.linalg.norm(dequantize(quantize(x, kind), kind) - x) / np.linalg.norm(x)
    print(f"{size:g}:", ", ".join(f"{kind.name} {off[kind, size]:.1e}" for kind in kinds))
x = w * np.float32(1e-5)
scaled = dequantize(quantize(x * 2**16, Type.Q8_0), Type.Q8_0) / 2**16
print(f"1e-05, times 2 ** 16 before and divided after: Q8_0 {np.linalg.norm(scaled - x) / np.linalg.norm(x):.1e}")
assert np.linalg.norm(scaled - x) < 0.01 * np.linalg.norm(x)
assert off[Type.Q8_0, 1] < 0.01 and off[Type.Q8_0, 1e-5] > off[Type.Q4_0, 1e-5] and off[Type.Q8_0, 1e-6] > 0.9, "small weights survive now"
with np.errstate(all="ignore"):
    large = dequantize(quantize(w * np.float32(1e7), Type.Q8_0), Type.Q8_0)
print(f"1e7: {np.isfinite(large).mean():.0%} of the weights in Q8_0 are numbers")
assert not np.isfinite(large).any()
PY
env/bin/python check.py
