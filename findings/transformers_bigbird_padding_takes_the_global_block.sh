#!/usr/bin/env bash
# transformers 5.24.0: block-sparse BigBirdModel on a padded row of a batch.
# Expected: the global tokens are the first and the last block of a sequence, which all tokens see and which see all; a row padded on the right,
#   with attention_mask, has the outputs it has alone, as with attention_type="original_full".
# Instead: the last block of the array is the global one. In a row that is shorter than the batch that block is padding and hidden, so
#   the row loses half of its global attention, its real last block sees a window only, and every output moves: what a text is
#   encoded as depends on the longest text beside it. No warning: the mask is respected, and the padding's content does nothing.
# Seen when run (one layer, blocks of 4, 64 real tokens):
#   block_sparse, alone: token 33 sees blocks [0, 7, 8, 9, 15], token 62 sees 16 of 16
#   block_sparse, padded to 80: token 33 sees blocks [0, 7, 8, 9], token 62 sees 3 of 16
#   block_sparse: padded against alone 1.5e-01, other content of the padding 0.0e+00
#   original_full: padded against alone 0.0e+00, other content of the padding 0.0e+00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import BigBirdConfig, BigBirdModel

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
block, n = 4, 64


def make(kind):
    """One layer with random weights large enough to matter."""
    model = BigBirdModel(BigBirdConfig(vocab_size=80, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
                                       attention_type=kind, block_size=block, num_random_blocks=1, max_position_embeddings=128))
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


ids = torch.randint(3, 60, (1, n))


def encode(model, ids, padding=0, fill=0):
    whole = torch.cat([ids, torch.full((1, padding), fill)], 1)
    return model(whole, attention_mask=(torch.arange(n + padding) < n).long()[None])[0][0, :n]


def blocks_seen(model, token, padding):
    base, seen = encode(model, ids, padding)[token], []
    for b in range(n // block):
        other = ids.clone()
        other[:, b * block : (b + 1) * block] += 7
        other[0, token] = ids[0, token]
        if not torch.allclose(encode(model, other, padding)[token], base, atol=1e-5):
            seen.append(b)
    return seen


model = make("block_sparse")
for padding in (0, 16):
    inner, last = blocks_seen(model, 33, padding), blocks_seen(model, 62, padding)
    print(f"block_sparse, {f'padded to {n + padding}' if padding else 'alone'}: token 33 sees blocks {inner}, token 62 sees {len(last)} of {n // block}")
    assert (15 in inner) == (len(last) == 16) == (padding == 0)
for kind in ("block_sparse", "original_full"):
    model = make(kind)
    alone, padded, other = encode(model, ids), encode(model, ids, 16), encode(model, ids, 16, 5)
    err, content = rel(padded, alone), rel(other, padded)
    print(f"{kind}: padded against alone {err:.1e}, other content of the padding {content:.1e}")
    assert content < 1e-6 and (err > 0.05 if kind == "block_sparse" else err < 1e-5)
PY
env/bin/python check.py
