#!/usr/bin/env bash
# routing-transformer 1.6.1: RoutingTransformerLM(causal=True), evaluated.
# Expected: the logits of a token do not depend on later tokens, so that a prefix in generation has the numbers it has in training.
# Instead: each cluster takes the tokens nearest to its centroid out of the whole sequence, a fixed number of them. Within a cluster later
#   keys are hidden, but whether a token is in it, and with whom, is decided with the later ones: a new token displaces an earlier one,
#   whose routed heads then see other keys, or give zeros. One changed last token moves a fifth of the tokens before it, and a
#   prefix alone differs from the same prefix in a text by two thirds. Local heads alone are causal.
# Seen when run (one layer, 64 tokens, relative difference of logits):
#   4 local heads: 0 of 63 earlier tokens move with the last one, by 0.0e+00; a prefix of 32 alone differs by 0.0e+00
#   2 local and 2 routed heads: 12 of 63 earlier tokens move with the last one, by 1.4e-01; a prefix of 32 alone differs by 6.4e-01
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile routing-transformer==1.6.1 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from routing_transformer import RoutingTransformerLM

torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
torch.manual_seed(1)
ids = torch.randint(1, 50, (1, 64))
other = ids.clone()
other[0, -1] = ids[0, -1] % 49 + 1
for local in (4, 2):
    model = RoutingTransformerLM(
        num_tokens=50, dim=32, depth=1, heads=4, max_seq_len=64, window_size=16, n_local_attn_heads=local, causal=True
    ).eval()
    torch.manual_seed(0)
    for p in model.parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    whole, changed, prefix = model(ids)[0], model(other)[0], model(ids[:, :32])[0]
    moved = sum(rel(changed[0, t], whole[0, t]) > 1e-4 for t in range(63))
    off = rel(changed[:, :-1], whole[:, :-1]), rel(prefix, whole[:, :32])
    kinds = f"{local} local heads" if local == 4 else f"{local} local and {4 - local} routed heads"
    print(f"{kinds}: {moved} of 63 earlier tokens move with the last one, by {off[0]:.1e}; "
          f"a prefix of 32 alone differs by {off[1]:.1e}")
    assert max(off) < 1e-5 if local == 4 else moved > 5 and min(off) > 0.02
PY
env/bin/python -W ignore check.py
