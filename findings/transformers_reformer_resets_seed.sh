#!/usr/bin/env bash
# transformers 5.24.0: ReformerConfig(hash_seed=3).
# Expected: a seed for the hashing makes the hashing repeatable and touches nothing else.
# Instead: each forward pass calls the global torch.manual_seed: whatever the program seeded
#   before, the random numbers drawn after a forward pass are always the same ones, also in
#   evaluation mode.
# Seen when run:
#   hash_seed=None: after seeds 11 and 99 drew [0.7694, 0.8017, 0.1284] [0.024, 0.6003, 0.8691]
#   hash_seed=3: after seeds 11 and 99 drew [0.1255, 0.0859, 0.5122] [0.1255, 0.0859, 0.5122]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import ReformerConfig, ReformerModel

transformers.logging.set_verbosity_error()
shape = dict(
    vocab_size=50, hidden_size=32, attention_head_size=16, num_attention_heads=2, feed_forward_size=64,
    attn_layers=["lsh"], lsh_attn_chunk_length=8, num_buckets=4, axial_pos_embds=False,
    max_position_embeddings=64, is_decoder=False,
)
ids = torch.arange(64)[None] % 50
for hash_seed in (None, 3):
    model = ReformerModel(ReformerConfig(**shape, hash_seed=hash_seed)).eval()
    draws = []
    for seed in (11, 99):
        torch.manual_seed(seed)
        with torch.no_grad():
            model(ids)
        draws.append(torch.rand(3))
    print(f"hash_seed={hash_seed}: after seeds 11 and 99 drew", *[[round(x, 4) for x in d.tolist()] for d in draws])
    assert torch.equal(*draws) == (hash_seed is not None)
PY
env/bin/python check.py
