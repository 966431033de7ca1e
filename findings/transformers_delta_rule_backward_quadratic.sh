#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: torch_chunk_gated_delta_rule, the gated delta rule that Qwen3-Next runs without
#   flash-linear-attention, in training.
# Expected: the chunked delta rule costs O(n), forward and backward, so twice the length allocates twice the bytes.
# Instead: forward it does; backward it allocates four times as much. The loop over chunks takes a slice of every
#   input and writes a slice of the output, and the gradient of each slice is a tensor as long as the whole sequence:
#   n / 64 chunks times n rows. At n = 8192 the backward pass of one head of 64 channels allocates 28 times what the
#   forward pass does.
# Seen when run (bytes allocated, the sum over all allocations):
#   n = 2048: forward 15 MiB, backward 115 MiB
#   n = 4096: forward 29 MiB, backward 423 MiB
#   n = 8192: forward 58 MiB, backward 1614 MiB
#   twice the length: forward 2.0 times, backward 3.8 times
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 transformers==5.24.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from torch.profiler import ProfilerActivity, profile
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule


def allocated(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = function()
    return result, sum(max(event.self_cpu_memory_usage, 0) for event in seen.key_averages())


found = {}
for n in (2048, 4096, 8192):
    q, k, v = (torch.randn(1, n, 1, 64).requires_grad_() for _ in range(3))
    g, beta = -torch.rand(1, n, 1), torch.rand(1, n, 1)
    out, forward = allocated(lambda: torch_chunk_gated_delta_rule(q, k / 8, v, g, beta)[0])
    _, backward = allocated(lambda: out.sum().backward())
    found[n] = forward, backward
    print(f"n = {n}: forward {forward / 2**20:.0f} MiB, backward {backward / 2**20:.0f} MiB")
forward = found[8192][0] / found[4096][0]
backward = found[8192][1] / found[4096][1]
print(f"twice the length: forward {forward:.1f} times, backward {backward:.1f} times")
assert forward < 2.2
assert backward > 3
PY
env/bin/python check.py 2>/dev/null
