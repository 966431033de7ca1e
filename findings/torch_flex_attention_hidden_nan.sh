#!/usr/bin/env bash
# torch 2.13.0: torch.nn.attention.flex_attention on a CPU with a causal block mask.
# Expected: a key that mask_mod hides from a row has no influence on it, so one NaN value at
#   key 200 of 256 spoils rows 200 to 255 and no others, compiled or not.
# Instead: compiled, rows 128 to 255 are NaN: all rows of the block of 128 that has a visible
#   pair with the key's block, 72 of which do not see the key. Called without compilation, all
#   256 rows are NaN. Weights of hidden pairs are 0, and 0 times NaN is NaN; what is skipped are
#   whole blocks alone, and which blocks are skipped depends on compilation.
# Seen when run:
#   eager: 256 rows are NaN, from row 0 on
#   compiled: 128 rows are NaN, from row 128 on
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, 256, 64) for _ in range(3))
v[0, 0, 200] = float("nan")
causal = create_block_mask(lambda b, h, row, key: key <= row, 1, 1, 256, 256, device="cpu")
spoilt = {}
for name, function in (("eager", flex_attention), ("compiled", torch.compile(flex_attention))):
    rows = function(q, k, v, block_mask=causal)[0, 0].isnan().any(dim=-1).nonzero().ravel().tolist()
    print(f"{name}: {len(rows)} rows are NaN, from row {rows[0]} on")
    spoilt[name] = rows
assert spoilt["eager"] == list(range(256))
assert spoilt["compiled"] == list(range(128, 256))
PY
env/bin/python check.py 2>/dev/null
