#!/usr/bin/env bash
# array-api-compat 1.16.0 with torch 2.13.0: array_api_compat.torch.result_type.
# Expected: a dtype is known while tracing, so result_type(x, y) compiles for every pair of
#   dtypes or for none.
# Instead: under torch.compile(fullgraph=True) a float32 with a float64 array compiles, but
#   any pair with bfloat16 or float16, and an integer with a float, raises
#   torch._dynamo.exc.Unsupported, though eager mode answers at once. Even two bfloat16
#   arrays fail. (Backend "eager": it is the tracing that fails, not code generation.)
# Seen when run:
#   torch.float32 torch.float64 eager torch.float64 | compiled torch.float64
#   torch.bfloat16 torch.float32 eager torch.float32 | compiled Unsupported: torch.* op returned non-
#     Tensor
#   torch.float16 torch.float32 eager torch.float32 | compiled Unsupported: torch.* op returned non-
#     Tensor
#   torch.bfloat16 torch.bfloat16 eager torch.bfloat16 | compiled Unsupported: torch.* op returned non-
#     Tensor
#   torch.int32 torch.float32 eager torch.float32 | compiled Unsupported: torch.* op returned non-Tensor
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile array-api-compat==1.16.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import array_api_compat.torch as xp
import torch


def promote(a, b):
    return a.to(xp.result_type(a, b)) + 1


bf16, f16, f32, f64, i32 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32
for one, two in ((f32, f64), (bf16, f32), (f16, f32), (bf16, bf16), (i32, f32)):
    a, b = torch.ones(2, dtype=one), torch.ones(2, dtype=two)
    torch._dynamo.reset()
    eager = promote(a, b).dtype
    try:
        traced = torch.compile(promote, fullgraph=True, backend="eager")(a, b).dtype
    except torch._dynamo.exc.Unsupported as exc:
        traced = "Unsupported: " + str(exc).splitlines()[0]
    print(one, two, "eager", eager, "| compiled", traced)
    assert eager is torch.promote_types(one, two)
    assert (traced is f64) if two is f64 else str(traced).startswith("Unsupported")
PY
env/bin/python check.py
