#!/usr/bin/env bash
# h-transformer-1d 0.1.9: HTransformer1D, hierarchical attention, causal or not.
# Expected: fine attention nearby and coarse attention far away, as in the paper: every token is reached by all others (or all earlier ones) in
#   one layer, in a cost linear in the length.
# Instead: the coarsest levels are left out. Not causal, one level too few is made, the same in each layer: the two halves of a
#   sequence never meet, at any depth, and a change of one half leaves each number of the other as it is. Causal, a coarse level is added only
#   to tokens at the very end of its span: most tokens see their own block alone, also in a layer of 1024 tokens, and the last token of a
#   span sees all but the block just before its own. Where two blocks are all there is, and the answer should be exact, it is not: each
#   level subtracts its own maximum before the levels' sums are added, so weights of two levels have different units.
# Seen when run (blocks of 16, 1024 tokens, 64 blocks):
#   not causal, 6 layers: first half moves by 0.0e+00 when the second changes, second half by 2.2e+00
#   causal, one layer: token 100 sees 1 of 7 blocks, token 511 sees 31 of 32 blocks (not block 30), token 512 sees 1 of 33
#     blocks, token 1000 sees 1 of 63 blocks
#   causal, one layer: 667 of the 1008 tokens after the first block see their own block alone
#   two blocks against softmax attention over them: logits of size 0.1 4.4e-02, of size 1 2.0e-01, of size 3 5.1e-01
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile h-transformer-1d==0.1.9 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from h_transformer_1d import HTransformer1D
from h_transformer_1d.h_transformer_1d import CausalHAttention1D, HAttention1D

torch.set_grad_enabled(False)
torch.manual_seed(0)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
block, n = 16, 1024

model = HTransformer1D(num_tokens=50, dim=32, depth=6, causal=False, max_seq_len=n, heads=4, dim_head=8, block_size=block).eval()
ids = torch.randint(0, 50, (1, n))
other = torch.cat([ids[:, : n // 2], (ids[:, n // 2 :] + 1) % 50], 1)
moved = (model(other) - model(ids)).abs()
first, second = moved[:, : n // 2].max().item(), moved[:, n // 2 :].max().item()
print(f"not causal, 6 layers: first half moves by {first:.1e} when the second changes, second half by {second:.1e}")
assert first == 0.0 and second > 0.1

layer = CausalHAttention1D(16, max_seq_len=n, heads=2, dim_head=8, block_size=block)
x = torch.randn(1, n, 16, dtype=torch.float64)
layer = layer.double()
base = layer(x)[0]
sees = torch.zeros(n, n // block, dtype=torch.bool)
for b in range(n // block):
    y = x.clone()
    y[:, b * block : (b + 1) * block] += torch.randn(block, 16, dtype=torch.float64)
    sees[:, b] = (layer(y)[0] - base).abs().amax(-1) > 1e-9


def told(t):
    own = t // block
    hidden = [b for b in range(own + 1) if not sees[t, b]]
    return f"token {t} sees {int(sees[t].sum())} of {own + 1} blocks" + (f" (not block {hidden[0]})" if len(hidden) == 1 else "")


print("causal, one layer: " + ", ".join(told(t) for t in (100, 511, 512, 1000)))
alone = int((sees[block:].sum(-1) == 1).sum())
print(f"causal, one layer: {alone} of the {n - block} tokens after the first block see their own block alone")
assert sees[100].sum() == 1 and sees[512].sum() == 1 and not sees[511, 30] and alone > n // 2

layer = HAttention1D(8, heads=1, dim_head=8, block_size=block)
layer.to_out = torch.nn.Identity()
errors = []
for size in (0.1, 1.0, 3.0):
    x = torch.randn(1, 4 * block, 8)
    q, k, v = layer.to_qkv(x).chunk(3, -1)
    x = x * (size / (q @ k.mT * 8**-0.5).std()) ** 0.5
    q, k, v = (a[:, : 2 * block] for a in layer.to_qkv(x).chunk(3, -1))
    errors.append(rel(layer(x)[:, : 2 * block], torch.softmax(q @ k.mT * 8**-0.5, -1) @ v))
print("two blocks against softmax attention over them: logits of size " + ", of size ".join(f"{s:g} {e:.1e}" for s, e in zip((0.1, 1, 3), errors)))
assert errors[1] > 0.01
PY
env/bin/python check.py
