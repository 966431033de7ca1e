#!/usr/bin/env bash
# torch 2.13.0, onnxscript 0.7.2, onnxruntime 1.32.0: torch.onnx.export(dynamo=True) of scatter_reduce(…, "mean"), the mean of each group, as
#   pooling by buckets, landmarks and documents is written.
# Expected: the means, as "sum" is exported right, or a refusal: ONNX has no such reduction.
# Instead: the reduction is left out. The file writes the rows over each other, and the last row of a group stands for its mean; with
#   include_self=True what was there before does not count either. Groups of one row are right with include_self=False, so that a
#   comparison on distinct indices passes.
# Seen when run (rows 2, 4, 6 into groups 0, 0, 1; before that all are 10):
#   sum, include_self=True: torch 16 16 10, exported 16 16 10
#   sum, include_self=False: torch 6 6 10, exported 6 6 10
#   mean, include_self=True: torch 5.33 8 10, exported 4 6 10
#   mean, include_self=False: torch 3 6 10, exported 4 6 10
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import logging
import warnings

import onnxruntime
import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


class Scatter(torch.nn.Module):
    def __init__(self, reduce, include_self):
        super().__init__()
        self.options = dict(reduce=reduce, include_self=include_self)

    def forward(self, start, groups, rows):
        return start.scatter_reduce(0, groups, rows, **self.options)


args = torch.full((3,), 10.0), torch.tensor([0, 0, 1]), torch.tensor([2.0, 4.0, 6.0])
told = lambda a: " ".join(f"{x:.3g}" for x in a)
for reduce, include_self in (("sum", True), ("sum", False), ("mean", True), ("mean", False)):
    model = Scatter(reduce, include_self)
    torch.onnx.export(model, args, "f.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession("f.onnx")
    feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
    right, exported = model(*args).tolist(), session.run(None, feed)[0].tolist()
    print(f"{reduce}, include_self={include_self}: torch {told(right)}, exported {told(exported)}")
    assert exported == (right if reduce == "sum" else [4, 6, 10]) and (reduce == "sum" or right != exported)
PY
env/bin/python check.py
