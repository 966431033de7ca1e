#!/usr/bin/env bash
# x-transformers 2.31.10: Decoder(attn_orthog_projected_values=True), (..._per_head=True) and (orthog_residual=True).
# Expected: both options remove from a token's vector its part along another vector of the same token, as in the papers they name; a
#   Decoder is causal whatever its options.
# Instead: the common helper flattens all axes but the batch before it projects, so one coefficient is taken over all tokens, future ones
#   and padding among them. Every output depends on the last token; a model trained so reads its targets in part, and a prefix in
#   generation differs from the same prefix in training by 5 to 15 %.
# Seen when run (relative):
#   plain: earlier logits move by 0.0e+00 with the last token, a prefix alone differs by 4.5e-07
#   attn_orthog_projected_values: earlier logits move by 1.4e-02 with the last token, a prefix alone differs by 1.5e-01
#   attn_orthog_projected_values_per_head: earlier logits move by 1.4e-02 with the last token, a prefix alone differs by 1.5e-01
#   orthog_residual: earlier logits move by 8.1e-03 with the last token, a prefix alone differs by 5.6e-02
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile x-transformers==2.31.10 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from x_transformers import Decoder, TransformerWrapper

torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
kinds = {
    "plain": {},
    "attn_orthog_projected_values": dict(attn_orthog_projected_values=True),
    "attn_orthog_projected_values_per_head": dict(attn_orthog_projected_values_per_head=True),
    "orthog_residual": dict(orthog_residual=True),
}
for name, options in kinds.items():
    torch.manual_seed(0)
    layers = Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, **options)
    model = TransformerWrapper(num_tokens=50, max_seq_len=64, attn_layers=layers).eval()
    for p in model.parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(0, 50, (1, 24))
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 7) % 50
    whole = model(ids)
    future = rel(model(other)[:, :-1], whole[:, :-1])
    prefix = rel(model(ids[:, :12]), whole[:, :12])
    print(f"{name}: earlier logits move by {future:.1e} with the last token, a prefix alone differs by {prefix:.1e}")
    assert max(future, prefix) < 1e-5 if name == "plain" else min(future, prefix) > 1e-3
PY
env/bin/python check.py
