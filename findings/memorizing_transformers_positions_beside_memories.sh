#!/usr/bin/env bash
# memorizing-transformers-pytorch 0.4.1: MemorizingTransformer(xl_max_memories=...), relative positions beside the memories of the last segment.
# Expected: the bias of a query and a key follows from their distance, so a text in two segments, the second beside the memories of the first,
#   gives one layer the logits of one pass.
# Instead: queries and keys are both counted from 0, and the keys begin with the memories: each query stands as many places too early as there are
#   memories. The newest tokens are all at distance 0, as is every key of the segment itself, and old memories count as near ones. From the
#   second segment on the model does not know the order of the segment at hand. The first segment is right, so a check without memories passes; with
#   the biases at 0 two segments and one pass agree.
# Seen when run (one layer, segments of 16 tokens):
#   first segment 0.0e+00, second 5.5e-01 from one pass; biases at 0: 0.0e+00 and 0.0e+00
#   last of 4 tokens beside 4 memories: distances [3, 2, 1, 0, 0, 0, 0, 0]
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
torch.manual_seed(0)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
model = MemorizingTransformer(
    num_tokens=50, dim=32, depth=1, dim_head=16, heads=2, memorizing_layers=(), xl_max_memories=64,
).eval()
for p in model.parameters():  # random weights large enough that every part of the model matters
    if p.ndim > 1:
        torch.nn.init.normal_(p, std=0.3)
tokens = torch.randint(1, 50, (1, 32))
bias = model.rel_pos_bias.relative_attention_bias.weight


def halves():
    whole, _ = model(tokens, [])
    first, memories = model(tokens[:, :16], [])
    second, _ = model(tokens[:, 16:], [], xl_memories=memories)
    return rel(first, whole[:, :16]), rel(second, whole[:, 16:])


with_bias = halves()
bias.zero_()
without = halves()
print(f"first segment {with_bias[0]:.1e}, second {with_bias[1]:.1e} from one pass; biases at 0: {without[0]:.1e} and {without[1]:.1e}")
bias += torch.arange(32)[:, None] / model.rel_pos_bias.scale  # each bias is the distance that it stands for
distances = model.rel_pos_bias(4, 8, device="cpu")[0, 0, -1].round().int().tolist()
print(f"last of 4 tokens beside 4 memories: distances {distances}")
assert with_bias[0] < 1e-5 and with_bias[1] > 0.1 and max(without) < 1e-5
assert distances == [3, 2, 1, 0, 0, 0, 0, 0]
PY
env/bin/python check.py
