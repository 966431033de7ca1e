#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy and safetensors.flax, save and save_file of a transposed NumPy array.
# Expected: what is loaded equals what was saved, as with version 0.7.0, or an error, as safetensors.torch gives for such a tensor. Weights of
#   linear layers and kernels of convolutions are transposed on their way between libraries, and w.T is a view.
# Instead: the file has the shape of the view and the numbers in the order of the memory behind it: another matrix. Nothing is raised, neither
#   when it is saved nor when it is loaded, and a square one does not even look odd. Rows of every second column are as wrong.
#   The documentation asks for "contiguous" tensors; a transposed one is contiguous in NumPy's flags, in Fortran's order.
#   np.ascontiguousarray before saving is the way out.
# Seen when run:
#   0.7.0, numpy: w right, w.T right, w[:, ::2] right, a copy of w.T right, w, other byte order right
#   0.8.0, numpy: w right, w.T wrong, w[:, ::2] wrong, a copy of w.T right, w, other byte order right
#   0.8.0, flax: w right, w.T wrong, w[:, ::2] wrong, a copy of w.T right, w, other byte order right
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile safetensors==0.8.0 jax==0.10.2 flax==0.12.8 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
python3 -m venv before
before/bin/pip install -q --no-compile safetensors==0.7.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import sys

import numpy as np
import safetensors

w = np.arange(12, dtype=np.float32).reshape(3, 4)
arrays = {"w": w, "w.T": w.T, "w[:, ::2]": w[:, ::2], "a copy of w.T": np.ascontiguousarray(w.T), "w, other byte order": w.astype(">f4")}
for name in sys.argv[1:]:
    library = __import__(f"safetensors.{name}", fromlist=["save"])
    right = {}
    for label, x in arrays.items():
        y = np.asarray(library.load(library.save({"x": x}))["x"])
        library.save_file({"x": x}, "x.safetensors")
        assert y.shape == x.shape and (np.asarray(library.load_file("x.safetensors")["x"]) == y).all()
        right[label] = (y == x).all()
    print(f"{safetensors.__version__}, {name}:", ", ".join(f"{label} {'right' if ok else 'wrong'}" for label, ok in right.items()))
    bad = [label for label, ok in right.items() if not ok]
    assert bad == ([] if safetensors.__version__ == "0.7.0" else ["w.T", "w[:, ::2]"]), bad
PY
before/bin/python check.py numpy
env/bin/python check.py numpy flax
