#!/usr/bin/env bash
# torch 2.13.0 (CPU), torch.nn.functional.scaled_dot_product_attention.
# Expected: attention is defined for any value width, and values with half as many columns
#   need less memory than values as wide as the query.
# Instead: when the values are narrower than the queries the fused kernel is not used, with
#   no warning, and whole query-by-key matrices are formed: memory grows with the square of
#   the length. Padding the values with zero columns up to the query's width brings the
#   small peak back and gives equal numbers.
# Seen when run:
#   narrow 145.0 MiB, zero-padded 3.1 MiB, largest difference 8.9e-08
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
q, k = torch.randn(2, 1, 1, 4096, 64)
v = torch.randn(1, 1, 4096, 32)
narrow, m_narrow = peak(lambda: attend(q, k, v))
padded, m_padded = peak(lambda: attend(q, k, F.pad(v, (0, 32)))[..., :32])
gap = (narrow - padded).abs().max().item()
print(f"narrow {m_narrow:.1f} MiB, zero-padded {m_padded:.1f} MiB, largest difference {gap:.1e}")
assert m_narrow > 60 and m_padded < 8 and gap < 1e-5
PY
env/bin/python check.py
