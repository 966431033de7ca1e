#!/usr/bin/env bash
# memorizing-transformers-pytorch 0.4.1: clear_memories_on_sos_token_id and clear_memories_on_eos_token_id.
# Expected: a row whose tokens hold the given id begins or ends a document there, and its memories of nearest neighbours are cleared, so that a
#   document does not retrieve keys and values of another one.
# Instead: the id is looked for after the tokens were replaced by their embeddings, and after the last layer: real numbers, which are not equal
#   to it. Nothing is ever cleared and nothing is raised: each document attends to those before it, in evaluation as in training.
#   Clearing by hand, memories.clear_memory([row]), works.
# Seen when run (two documents of 16 tokens in turn):
#   clear_memories_on_sos_token_id=1: 16 memories after the first document, the second differs from it alone by 5.3e-01
#   clear_memories_on_eos_token_id=2: 16 memories after the first document, the second differs from it alone by 5.3e-01
#   cleared by hand: 0 memories after the first document, the second differs from it alone by 0.0e+00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile faiss-cpu==1.15.1 einops-exts==0.0.4 joblib==1.6.0 einops==0.8.2 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
env/bin/pip install -q --no-compile --no-deps memorizing-transformers-pytorch==0.4.1 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from memorizing_transformers_pytorch import MemorizingTransformer

torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
first, second = torch.randint(3, 50, (2, 1, 16), generator=torch.Generator().manual_seed(0))
first[:, 0] = second[:, 0] = 1
first[:, -1] = second[:, -1] = 2


def run(by_hand, **options):
    torch.manual_seed(0)
    model = MemorizingTransformer(
        num_tokens=50, dim=32, depth=2, dim_head=16, heads=2, memorizing_layers=1, num_retrieved_memories=4, **options,
    ).eval()
    for p in model.parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    with model.knn_memories_context(batch_size=1) as memories:
        alone = model(second, memories)
    with model.knn_memories_context(batch_size=1) as memories:
        model(first, memories)
        if by_hand:
            memories.clear_memory([0])
        held = memories[0].knns[0].index.ntotal
        return held, rel(model(second, memories), alone)


for name, by_hand, options in (
    ("clear_memories_on_sos_token_id=1", False, dict(clear_memories_on_sos_token_id=1)),
    ("clear_memories_on_eos_token_id=2", False, dict(clear_memories_on_eos_token_id=2)),
    ("cleared by hand", True, {}),
):
    held, off = run(by_hand, **options)
    print(f"{name}: {held} memories after the first document, the second differs from it alone by {off:.1e}")
    assert held == 0 and off < 1e-5 if by_hand else held == 16 and off > 0.01
PY
env/bin/python check.py
