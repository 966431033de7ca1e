#!/usr/bin/env bash
# torch 2.13.0 (CPU), torch.nn.functional.scaled_dot_product_attention.
# Expected: leading axes are documented as any batch axes (N, ..., L, E), so a (batch, n, d)
#   input costs what (batch, 1, n, d) costs, and keys shared by all heads cost no more than
#   keys repeated for each head.
# Instead: the fused kernel takes exactly four axes of equal sizes. With three or five axes,
#   or with one key head left to broadcast over four query heads, whole query-by-key matrices
#   are formed without a word. Reshaping to four axes, or an explicit expand (no copy),
#   restores the small peak.
# Seen when run:
#   {'four axes': 2.1, 'three axes': 145.0, 'five axes': 145.0, 'expanded heads': 5.2, 'broadcast
#     heads': 580.0}
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile


def peak(call):
    """The result, and the largest running total of allocated bytes, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        out = call()
    events = prof.profiler.kineto_results.events()
    total = top = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        top = max(top, total)
    return out, top / 2**20


attend = F.scaled_dot_product_attention
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 4096, 64)
four_heads = torch.randn(1, 4, 4096, 64)
mib = {
    "four axes": peak(lambda: attend(q, k, v))[1],
    "three axes": peak(lambda: attend(q[0], k[0], v[0]))[1],
    "five axes": peak(lambda: attend(q[None], k[None], v[None]))[1],
    "expanded heads": peak(lambda: attend(four_heads, k.expand(1, 4, -1, -1), v.expand(1, 4, -1, -1)))[1],
    "broadcast heads": peak(lambda: attend(four_heads, k, v))[1],
}
print({name: round(value, 1) for name, value in mib.items()})
assert mib["four axes"] < 8 and mib["expanded heads"] < 16
assert mib["three axes"] > 60 and mib["five axes"] > 60 and mib["broadcast heads"] > 240
PY
env/bin/python check.py
