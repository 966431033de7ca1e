#!/usr/bin/env bash
# sinkhorn-transformer 0.11.4: SinkhornSelfAttention, not causal, with the defaults of SinkhornTransformer.
# Expected: attention: each output is a weighted mean of values, those of the token's own bucket and of the bucket that was sorted to it, so
#   values of zeros give zeros, and what a far token has to say is its value.
# Instead: the sorted buckets' values are made from their keys. What comes from another bucket is a mean of keys, the values of
#   other buckets enter nowhere, and a layer whose values are all 0 still gives numbers. The causal attention beside it is right, and with
#   n_sortcut=1 the values are used. Nothing is raised: the shapes fit.
# Seen when run (64 tokens, buckets of 8):
#   not causal: values of zeros give outputs of size 9.8e-02; outputs of a bucket move by 0.0e+00 when all values outside it change
#   n_sortcut=1: values of zeros give outputs of size 0.0e+00; outputs of a bucket move by 1.0e-01 when all values outside it change
#   causal: values of zeros give outputs of size 0.0e+00; outputs of a bucket move by 4.4e-01 when all values outside it change
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile sinkhorn-transformer==0.11.4 local-attention==1.11.2 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from sinkhorn_transformer.sinkhorn_transformer import SinkhornCausalAttention, SinkhornSelfAttention

torch.set_grad_enabled(False)
shape = dict(dim=16, bucket_size=8, max_seq_len=64, heads=2)


def check(name, **options):
    torch.manual_seed(0)
    attend = SinkhornSelfAttention(**shape, **options).eval().sinkhorn_attention
    if isinstance(attend, SinkhornCausalAttention):
        attend.null_values.zero_()  # a learned value for the first bucket, which has no past
    q, k, v, w = torch.randn(4, 1, 2, 64, 8)
    silent = attend(q, k, torch.zeros_like(v)).abs().max().item()
    moved = 0.0
    for own in range(8):
        inside = slice(own * 8, own * 8 + 8)
        other = w.clone()
        other[:, :, inside] = v[:, :, inside]
        moved = max(moved, (attend(q, k, other) - attend(q, k, v))[:, :1, inside].abs().max().item())
    print(f"{name}: values of zeros give outputs of size {silent:.1e}; "
          f"outputs of a bucket move by {moved:.1e} when all values outside it change")
    return silent, moved


silent, moved = check("not causal")
assert silent > 0.01 and moved == 0
for name, options in (("n_sortcut=1", dict(n_sortcut=1)), ("causal", dict(causal=True))):
    silent, moved = check(name, **options)
    assert silent == 0 and moved > 0.01
PY
env/bin/python check.py
