#!/usr/bin/env bash
# Mega-pytorch 0.1.0: Mega(causal=True) with norm_mhesa_heads=True or laplacian_attn_fn=True, evaluated.
# Expected: a causal model is causal whatever its options: the logits of a token do not depend on later tokens, nor on how many there are.
# Instead: norm_mhesa_heads lays a group norm over channels and all places of the sequence, future ones and padding among them, so that mean and
#   variance carry later tokens to earlier ones; and the Laplacian attention divides its logits by the length of the
#   array at hand, not by the number of keys that a token sees. A model trained so reads its targets in part with the first, and with
#   both a prefix in generation has other numbers than the same prefix in training. The defaults are causal.
# Seen when run (relative differences):
#   default: tokens 0 to 47 move by 4.5e-07 when later ones change, a prefix of 16 alone differs by 4.5e-07
#   norm_mhesa_heads: tokens 0 to 47 move by 8.5e-02 when later ones change, a prefix of 16 alone differs by 2.5e-01
#   laplacian_attn_fn: tokens 0 to 47 move by 4.6e-07 when later ones change, a prefix of 16 alone differs by 6.2e-02
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile Mega-pytorch==0.1.0 torch==2.13.0 numpy==2.4.6 scipy==1.17.1 einops==0.8.2 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from mega_pytorch.mega_pytorch import Mega

torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
ids = torch.randint(0, 50, (1, 64), generator=torch.Generator().manual_seed(1))
changed = torch.cat([ids[:, :48], (ids[:, 48:] + 7) % 50], 1)  # the last 16 tokens are others
for name, options in {"default": {}, "norm_mhesa_heads": dict(norm_mhesa_heads=True), "laplacian_attn_fn": dict(laplacian_attn_fn=True)}.items():
    torch.manual_seed(0)
    model = Mega(num_tokens=50, dim=32, depth=2, ema_heads=4, attn_dim_qk=16, attn_dim_value=32, causal=True, **options).eval()
    for p in model.parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5)
    logits = model(ids)
    future, prefix = rel(model(changed)[:, :48], logits[:, :48]), rel(model(ids[:, :16]), logits[:, :16])
    print(f"{name}: tokens 0 to 47 move by {future:.1e} when later ones change, a prefix of 16 alone differs by {prefix:.1e}")
    if name == "default":
        assert future < 1e-5 and prefix < 1e-5
    else:
        assert prefix > 0.02 and (future > 0.02 if name == "norm_mhesa_heads" else future < 1e-5)
PY
env/bin/python check.py
