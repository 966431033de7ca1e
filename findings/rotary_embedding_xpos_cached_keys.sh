#!/usr/bin/env bash
# rotary-embedding-torch 0.9.1: RotaryEmbedding(use_xpos=True).rotate_queries_with_cached_keys, made for decoding.
# Expected: one new query beside the cached keys has the logits it has in a pass over the whole sequence (rotate_queries_and_keys), as it has
#   without xpos; the scales of xpos are powers of query position minus key position.
# Instead: the powers are counted from the middle of the tensor at hand, which cancels only if queries and keys are equally many. For one
#   query and n keys a factor is left in every channel, up to 3.5 ** (n / 1024): a fifth of the logits at 512 keys, two fifths at 2048, with
#   the model and its weights unchanged and nothing raised.
# Seen when run (relative difference from the whole pass):
#   64 keys: logits of the last query alone 3.3e-02, with all queries 0.0e+00; without xpos 1.5e-07
#   512 keys: logits of the last query alone 2.2e-01, with all queries 0.0e+00; without xpos 1.6e-07
#   2048 keys: logits of the last query alone 3.9e-01, with all queries 0.0e+00; without xpos 1.5e-07
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile rotary-embedding-torch==0.9.1 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from rotary_embedding_torch import RotaryEmbedding

torch.manual_seed(0)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
for n in (64, 512, 2048):
    q, k = torch.randn(2, 1, 1, n, 64)
    whole_q, whole_k = RotaryEmbedding(dim=64, use_xpos=True).rotate_queries_and_keys(q, k)
    want = (whole_q @ whole_k.mT)[..., -1:, :]
    off = {}
    for rows in (1, n):
        last_q, all_k = RotaryEmbedding(dim=64, use_xpos=True).rotate_queries_with_cached_keys(q[..., -rows:, :], k)
        off[rows] = rel((last_q @ all_k.mT)[..., -1:, :], want)
    plain = RotaryEmbedding(dim=64)
    last_q, all_k = plain.rotate_queries_with_cached_keys(q[..., -1:, :], k)
    turned = (plain.rotate_queries_or_keys(q) @ plain.rotate_queries_or_keys(k).mT)[..., -1:, :]
    off["plain"] = rel(last_q @ all_k.mT, turned)
    print(f"{n} keys: logits of the last query alone {off[1]:.1e}, with all queries {off[n]:.1e}; without xpos {off['plain']:.1e}")
    assert max(off[n], off["plain"]) < 1e-4 and off[1] > (0.01 if n == 64 else 0.2)
PY
env/bin/python check.py
