#!/usr/bin/env bash
# linear-attention-transformer 0.19.1: linear_attn and causal_linear_attn.
# Expected: weighted means, as attention is: values of all ones give ones; the causal form
#   lets position i see positions 0..i.
# Instead: linear_attn's weights sum to 1/sqrt(d) (0.25 for 16 columns), since the queries
#   are scaled after their softmax. The causal form gives ones, but sees only whole earlier
#   buckets: the first bucket's outputs are all zero and no token sees itself.
# Seen when run:
#   weight sum 0.25
#   causal weight sum by position {0: 0.0, 31: 0.0, 32: 1.0, 127: 1.0}
#   position 60 sees 0..31
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile linear-attention-transformer==0.19.1 einops==0.8.2 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from linear_attention_transformer.linear_attention_transformer import causal_linear_attn, linear_attn

torch.manual_seed(0)
q, k = torch.randn(2, 1, 2, 128, 16)
v = torch.ones(1, 2, 128, 16, requires_grad=True)
whole = linear_attn(q, k, v)
causal = causal_linear_attn(q, k, v, bucket_size=32)
print("weight sum", round(whole[0, 0, 5, 0].item(), 4))
print("causal weight sum by position", {i: round(causal[0, 0, i, 0].item(), 3) for i in (0, 31, 32, 127)})
(g,) = torch.autograd.grad(causal[0, 0, 60].sum(), v)
seen = g[0, 0].abs().sum(-1).nonzero()[:, 0].tolist()
print(f"position 60 sees {seen[0]}..{seen[-1]}")
assert torch.allclose(whole, torch.full_like(whole, 0.25), atol=1e-5)
assert (causal[:, :, :32] == 0).all() and torch.allclose(causal[:, :, 32:], torch.ones(()), atol=1e-5)
assert seen == list(range(32))
PY
env/bin/python check.py
