#!/usr/bin/env bash
# transformers 5.24.0: BigBirdModel with block-sparse attention, training against eval().
# Expected: eval() switches dropout off and nothing else; the random blocks are part of the
#   attention pattern.
# Instead: in eval() no random block is used. All random places point at block 0, which is
#   attended to anyway (so it is counted again). A token that depends on 10 or 11 of the
#   32 blocks in training depends on 5 in evaluation.
# Seen when run:
#   token 40: training [0, 1, 2, 3, 6, 7, 9, 10, 11, 31], eval [0, 9, 10, 11, 31]
#   token 60: training [0, 1, 3, 5, 6, 7, 8, 14, 15, 16, 31], eval [0, 14, 15, 16, 31]
#   token 80: training [0, 1, 3, 4, 7, 8, 19, 20, 21, 31], eval [0, 19, 20, 21, 31]
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
torch.manual_seed(0)
config = BigBirdConfig(
    vocab_size=70, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    block_size=4, num_random_blocks=3, max_position_embeddings=256, attention_type="block_sparse",
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)
model = BigBirdModel(config)
ids = torch.randint(0, 50, (1, 128))


def blocks(position):
    x = model.embeddings.word_embeddings(ids).detach().requires_grad_()
    out = model(inputs_embeds=x).last_hidden_state[0, position, 0]
    (g,) = torch.autograd.grad(out, x)
    return g[0].abs().sum(-1).view(32, 4).sum(-1).nonzero()[:, 0].tolist()


for position in (40, 60, 80):
    b = position // 4
    train, evaluation = model.train() and blocks(position), model.eval() and blocks(position)
    print(f"token {position}: training {train}, eval {evaluation}")
    assert evaluation == [0, b - 1, b, b + 1, 31] and len(train) > 6
PY
env/bin/python check.py
