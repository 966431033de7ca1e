#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU): Sigmoid, Swish and what is exported to them (sigmoid, silu) of float32, below about -12.
# Expected: sigmoid(x) is exp(x) there, to the digits of float32 as far as -87, as NumPy, PyTorch and JAX give, and as Softplus and Softmax of
#   ONNX Runtime itself give.
# Instead: a rational approximation that is good in absolute terms alone: wrong by a factor of two at -16 and -17, and exactly 0 below -18. A forget
#   or update gate that is nearly shut is shut for good, its logarithm is -inf, and the quotient of two small gates is NaN.
#   A comparison with absolute tolerance, which exporters print, passes. float64 is right as far as -20.
# Seen when run (sigmoid in ONNX Runtime over the exact value):
#   -5: float32 1.0000, float64 1.0000, Softplus in float32 1.0000
#   -10: float32 0.9998, float64 1.0000, Softplus in float32 1.0000
#   -16: float32 0.5297, float64 1.0000, Softplus in float32 1.0000
#   -17: float32 2.1596, float64 1.0000, Softplus in float32 1.0000
#   -19: float32 0.0000, float64 1.0000, Softplus in float32 1.0000
#   -20: float32 0.0000, float64 1.0000, Softplus in float32 1.0000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

points = np.array([-5.0, -10.0, -16.0, -17.0, -19.0, -20.0])
exact = 1 / (1 + np.exp(-points))


def run(kind, operator, x):
    value = lambda name: helper.make_tensor_value_info(name, kind, list(x.shape))
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", [value("x")], [value("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


single = run(TensorProto.FLOAT, "Sigmoid", points.astype(np.float32)) / exact
double = run(TensorProto.DOUBLE, "Sigmoid", points) / exact
softplus = run(TensorProto.FLOAT, "Softplus", points.astype(np.float32)) / np.log1p(np.exp(points))
for x, s, d, p in zip(points, single, double, softplus):
    print(f"{x:g}: float32 {s:.4f}, float64 {d:.4f}, Softplus in float32 {p:.4f}")
assert np.abs(softplus - 1).max() < 1e-5 and np.abs(double - 1).max() < 1e-4 and abs(single[0] - 1) < 1e-4
assert (single[-2:] == 0).all() and np.abs(single[2:4] - 1).max() > 0.1
PY
env/bin/python check.py
