#!/usr/bin/env bash
# mlx 0.32.4 (CPU), gguf 0.19.0: mx.load of a GGUF file that holds tensors of the types MXFP4, TQ1_0 or TQ2_0, or of BF16.
# Expected: all tensors of the file, or an error, as MLX gives for Q5_0 and others that it cannot decode.
# Instead: loading ends without a word at the first tensor of such a type: it and all that follow in the file, float32 ones among them, are
#   missing from the dictionary, and a loader that is not strict about missing names keeps the weights it had.
#   And bfloat16 comes back as float16, though MLX has bfloat16: what is beyond 65504 is inf, what is below 3e-8 is 0.
# Seen when run (three tensors, the first and the third of float32):
#   second of F16: ['first', 'second', 'third']
#   second of Q8_0: ['first', 'second', 'third']
#   second of Q5_0: RuntimeError [load_gguf] gguf_tensor_to_f16 failed
#   second of TQ1_0: ['first']
#   second of TQ2_0: ['first']
#   second of MXFP4: ['first']
#   BF16 as written [9.968061931431293e-10, 1.0013580322265625e-05, 99840.0, -998244352.0]
#     as loaded [0.0, 1.0013580322265625e-05, inf, -inf] mlx.core.float16
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile "mlx[cpu]==0.32.4" gguf==0.19.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type

w = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)


def write(tensors):
    writer = gguf.GGUFWriter("model.gguf", "llama")
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded():
    try:
        return sorted({name.split(".")[0] for name in mx.load("model.gguf")})
    except RuntimeError as error:
        return f"RuntimeError {error}"


for kind in (Type.F16, Type.Q8_0, Type.Q5_0, Type.TQ1_0, Type.TQ2_0, Type.MXFP4):
    write({"first.weight": (w, Type.F32), "second.weight": (w, kind), "third.weight": (w, Type.F32)})
    there = [tensor.name.split(".")[0] for tensor in gguf.GGUFReader("model.gguf").tensors]
    assert there == ["first", "second", "third"]
    seen = loaded()
    print(f"second of {kind.name}: {seen}")
    ends = kind in (Type.TQ1_0, Type.TQ2_0, Type.MXFP4)
    assert seen == (["first"] if ends else there) or kind is Type.Q5_0 and isinstance(seen, str), "other tensors are loaded now"

x = np.tile(np.float32([1, 1e-9, 1e-5, 1e5, -1e9, 0, 2, 3]), (1, 32))
write({"x.weight": (x, Type.BF16)})
exact = gguf.quants.dequantize(gguf.GGUFReader("model.gguf").tensors[0].data, Type.BF16)
y = mx.load("model.gguf")["x.weight"]
print("BF16 as written", exact[0, 1:5].tolist(), "as loaded", y[0, 1:5].tolist(), y.dtype)
assert y.dtype == mx.float16 and y[0, 1].item() == 0 and y[0, 3].item() == np.inf, "bfloat16 is kept now"
PY
env/bin/python check.py
