#!/usr/bin/env bash
# yet-another-retnet 0.5.1: RetNet(dtype=torch.bfloat16) and its layers and functions of retention.
# Expected: decays are made in float32, or as logarithms, and bfloat16 costs one per cent: each head forgets at its own rate, the slowest by a
#   factor of 1 - 1/512 per token, as the paper has it.
# Instead: decays are made in the dtype of the queries. bfloat16 has no number between 1 - 1/256 and 1: the slowest head never forgets, at any
#   length, and others share a rate. A pass and decoding both keep all tokens for ever, and nothing is raised.
#   (float16, with three bits more, is near enough.)
# Seen when run:
#   torch.float32: 8 rates for 8 heads, slowest 0.99805
#     weight of a token 1024 places back in the last three heads: 0.0120, 0.0510, 0.1351; step by step 0.1351
#   torch.float16: 8 rates for 8 heads, slowest 0.99805
#     weight of a token 1024 places back in the last three heads: 0.0110, 0.0496, 0.1351; step by step 0.1401
#   torch.bfloat16: 6 rates for 8 heads, slowest 1.00000
#     weight of a token 1024 places back in the last three heads: 0.0182, 0.0182, 1.0000; step by step 1.0000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile yet-another-retnet==0.5.1 torch==2.13.0 numpy==2.4.6 einops==0.8.2 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from yet_another_retnet.retention import retention_parallel, retention_recurrent

torch.set_grad_enabled(False)
seen = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    x = torch.zeros(1, 8, 1025, 1, dtype=dtype)
    _, weights = retention_parallel(x + 1, x + 1, x, scale=1.0, need_weights=True)
    rates, far = weights[0, :, 1, 0].tolist(), weights[0, :, 1024, 0].tolist()
    nothing, state = x[:, :, 0], None
    for i in range(1025):  # a first token, then empty ones
        key = nothing + 1 if i == 0 else nothing
        left, state = retention_recurrent(nothing + 1, key, key, state, scale=1.0)
    left = left.flatten().tolist()
    print(f"{dtype}: {len(set(rates))} rates for 8 heads, slowest {rates[-1]:.5f}")
    last = ", ".join(f"{v:.4f}" for v in far[-3:])
    print(f"  weight of a token 1024 places back in the last three heads: {last}; step by step {left[-1]:.4f}")
    seen[dtype] = (len(set(rates)), far[-1], left[-1])
for dtype, (rates, far, left) in seen.items():
    if dtype == torch.bfloat16:
        assert rates < 8 and far == left == 1
    else:
        assert rates == 8 and 0.1 < far < 0.2 and 0.1 < left < 0.2
PY
env/bin/python check.py
