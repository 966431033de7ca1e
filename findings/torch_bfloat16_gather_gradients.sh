#!/usr/bin/env bash
# torch 2.13.0 (CPU): the gradient of rows that are taken many times from a bfloat16 or float16 table.
# Expected: ways to spell a gather that give equal numbers have equal gradients; a sum of many gradients is kept in float32 until it is
#   stored, as sums, products and running sums of half precision are here.
# Instead: x[i] and nn.functional.embedding add into the gradient in the dtype of the table, term by term: it stands still at 256 in bfloat16, at
#   2048 in float16, however often the row was taken. index_select of the same rows gives the true sum. A frequent token (a space, a
#   separator) of an embedding in bfloat16 stops learning from the rest of its batch. The sums by groups differ likewise: scatter_add
#   is right, index_add, index_put(accumulate=True) and segment_reduce stand still.
# Seen when run (one row taken 4096 times, each gradient 1):
#   torch.bfloat16: x[i] 256, embedding 256, index_select 4096
#   torch.bfloat16: index_add 256, index_put 256, segment_reduce 256, scatter_add 4096
#   torch.float16: x[i] 2048, embedding 2048, index_select 4096
#   torch.float16: index_add 2048, index_put 2048, segment_reduce 2048, scatter_add 4096
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch

n = 4096
rows = torch.zeros(n, dtype=torch.int64)
gathers = {
    "x[i]": lambda x: x[rows],
    "embedding": lambda x: torch.nn.functional.embedding(rows, x),
    "index_select": lambda x: x.index_select(0, rows),
}
groups = {
    "index_add": lambda zero, one: zero.index_add(0, rows, one),
    "index_put": lambda zero, one: zero.index_put((rows,), one, accumulate=True),
    "segment_reduce": lambda zero, one: torch.segment_reduce(one, "sum", lengths=torch.tensor([n])),
    "scatter_add": lambda zero, one: zero.scatter_add(0, rows, one),
}
for dtype, stop in ((torch.bfloat16, 256), (torch.float16, 2048)):
    found = {}
    for name, gather in gathers.items():
        x = torch.zeros(4, 1, dtype=dtype, requires_grad=True)
        gather(x).backward(torch.ones(n, 1, dtype=dtype))
        found[name] = x.grad[0].item()
    added = {name: group(torch.zeros(1, dtype=dtype), torch.ones(n, dtype=dtype))[0].item() for name, group in groups.items()}
    for some in (found, added):
        print(f"{dtype}: " + ", ".join(f"{name} {x:.0f}" for name, x in some.items()))
        *still, last = some.values()
        assert still == [stop] * len(still) and last == n
PY
env/bin/python check.py
