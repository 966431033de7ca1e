#!/usr/bin/env bash
# local-attention 1.11.2: LocalAttention(autopad=True), not causal, no mask.
# Expected: with autopad the layer pads to whole windows and hides what it added, so with
#   values of all ones each output is 1, and the length does not matter.
# Instead: the zero rows it adds are attended to as keys: the last two windows give 0.7 to
#   0.95 where 1 is right. An all-True mask, which should say nothing, repairs it.
# Seen when run:
#   16 tokens: smallest weight sum 1.000, with all-True mask 1.000
#   14 tokens: smallest weight sum 0.703, with all-True mask 1.000
#   13 tokens: smallest weight sum 0.768, with all-True mask 1.000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile local-attention==1.11.2 einops==0.8.2 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from local_attention import LocalAttention

torch.manual_seed(0)
layer = LocalAttention(window_size=4, causal=False, autopad=True, use_rotary_pos_emb=False)
for n in (16, 14, 13):
    q, k = torch.randn(2, 1, 1, n, 8)
    ones = torch.ones(1, 1, n, 8)
    bare = layer(q, k, ones)[0, 0, :, 0]
    masked = layer(q, k, ones, mask=torch.ones(1, n, dtype=torch.bool))[0, 0, :, 0]
    print(f"{n} tokens: smallest weight sum {bare.min():.3f}, with all-True mask {masked.min():.3f}")
    assert abs(masked - 1).max() < 1e-5
    assert abs(bare - 1).max() < 1e-5 if n == 16 else bare[8:].max() < 0.99
PY
env/bin/python check.py
