#!/usr/bin/env bash
# transformers 5.24.0: local attention of ReformerModel with is_decoder=False.
# Expected: a token attends to its own chunk and to the one before it (local_num_chunks_before=1, local_num_chunks_after=0); the first chunk has
#   none before it.
# Instead: the chunks are laid on a ring. The first tokens of a sequence attend to its last ones, as if they were their
#   neighbours, while the tokens between see nothing of either end. So an encoding of the beginning depends on how the text ends and on the
#   length it is padded to, attention_mask or not. With is_decoder=True the causal mask hides the wrap.
# Seen when run (one layer, chunks of 8, 64 tokens):
#   is_decoder=False: token 3 sees chunks [0, 7], token 20 sees [1, 2], token 60 sees [6, 7]
#   is_decoder=True: token 3 sees chunks [0], token 20 sees [1, 2], token 60 sees [6, 7]
#   is_decoder=False, 40 tokens padded to 64 and masked, against alone: chunk 0 off by 7.3e-01, chunks 1 to 4 by 0.0e+00
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
torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
chunk, n = 8, 64


def make(is_decoder):
    """One layer of local attention with random weights large enough to matter."""
    config = ReformerConfig(vocab_size=60, hidden_size=32, num_attention_heads=4, attention_head_size=8, feed_forward_size=48,
                            attn_layers=["local"], local_attn_chunk_length=chunk, local_num_chunks_before=1, local_num_chunks_after=0,
                            axial_pos_shape=[8, 8], axial_pos_embds_dim=[16, 16], max_position_embeddings=n, is_decoder=is_decoder)
    model = ReformerModel(config)
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


ids = torch.randint(3, 60, (1, n))


def chunks_seen(model, token):
    """Chunks whose content, the token itself left as it is, moves the token's output."""
    base, seen = model(ids)[0][0, token], []
    for c in range(n // chunk):
        other = ids.clone()
        other[:, c * chunk : (c + 1) * chunk] = (other[:, c * chunk : (c + 1) * chunk] + 7) % 60
        other[0, token] = ids[0, token]
        if not torch.allclose(model(other)[0][0, token], base, atol=1e-5):
            seen.append(c)
    return seen


for is_decoder, first in ((False, [0, 7]), (True, [0])):
    model = make(is_decoder)
    seen = {t: chunks_seen(model, t) for t in (3, 20, 60)}
    print(f"is_decoder={is_decoder}: token 3 sees chunks {seen[3]}, token 20 sees {seen[20]}, token 60 sees {seen[60]}")
    assert seen == {3: first, 20: [1, 2], 60: [6, 7]}

model = make(False)
short = ids[:, :40]
alone = model(short, attention_mask=torch.ones_like(short))[0]
mask = (torch.arange(n) < 40).long()[None]
padded = model(ids * mask, attention_mask=mask)[0][:, :40]
start, rest = rel(padded[:, :chunk], alone[:, :chunk]), rel(padded[:, chunk:], alone[:, chunk:])
print(f"is_decoder=False, 40 tokens padded to {n} and masked, against alone: chunk 0 off by {start:.1e}, chunks 1 to 4 by {rest:.1e}")
assert start > 0.05 and rest < 1e-5
PY
env/bin/python check.py
