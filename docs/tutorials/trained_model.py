"""Run a trained state-space model that somebody else published, on NumPy, PyTorch and JAX.

    python docs/tutorials/trained_model.py

labels a text, compares the numbers and the times of this program with those of the model's own package, and writes
trained_model.json beside itself, from which the page has its picture. Needs the package typeseg; PyTorch and JAX are
used where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import array_namespace

import subquad

BLOCKS, RANK, STATES = 6, 16, 16
FILE = Path(__file__).with_suffix(".json")
TEXT = """\
<h1>Menu</h1>
<p class="note">Soup of the day, see the <a href="/list">list</a></p>
.note { color: #a33; margin: 0 2em; }
.menu > a:hover { text-decoration: underline; }
import math

def price(dish, tip=0.1):
    return round(dish.cost * (1 + tip), 2)

SELECT name, cost FROM dishes
WHERE cost < 9 ORDER BY name;
VGhlIHNvdXAgaXMgbWFkZSBpbiB0aGUgbW9ybmluZy4gTm8gbW9yZSBhZnRlciB0d28u
"""


def data(name: str) -> Path:
    """A file of the installed package, which is not imported for it."""
    return Path(str(importlib.metadata.distribution("typeseg").locate_file(f"typeseg/data/{name}")))


def weights() -> dict[str, np.ndarray]:
    """The arrays of the model by name: 1.36 million numbers in float32."""
    with np.load(data("mamba_al.npz"), allow_pickle=False) as file:
        return dict(file)


def tokens(text: str) -> np.ndarray:
    """(n,): the bytes of a text in UTF-8; 128 stands for those beyond ASCII and for control characters."""
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    known = ((codes >= 32) & (codes < 127)) | np.isin(codes, [9, 10, 13])
    return np.where(known, codes, 128)


def logits(w: Mapping[str, Any], ids: Any) -> Any:
    """(texts, n, 35): how much each byte looks like each kind of text, for tokens (texts, n)."""
    x = w["Embed_0__embedding"][ids]
    for i in range(BLOCKS):
        x = x + block(w, f"CheckpointMambaBlock1D_{i}__", x)
    return dense(w, "Dense_0", normed(w, "LayerNorm_0", x))


def block(w: Mapping[str, Any], at: str, x: Any) -> Any:
    """A Mamba block that reads in both directions; `at` is what the names of its arrays begin with."""
    xp = array_namespace(x)
    u, z = halves(dense(w, at + "Dense_0", normed(w, at + "LayerNorm_0", x)))
    taps, end = xp.matrix_transpose(w[at + "Conv_0__kernel"][:, 0, :]), xp.zeros_like(u[:, :1, :])
    u = xp.concat([u, end, end], axis=1)  # of 4 taps two look ahead: the causal convolution, two steps late
    u = subquad.causal_conv1d(u, taps, w[at + "Conv_0__bias"], activation="silu")[:, 2:, :]
    maps = dense(w, at + "Dense_1", u)
    delta = softplus(dense(w, at + "Dense_2", maps[..., :RANK])) + 1e-4
    B, C = halves(maps[..., RANK:])
    model = u, delta, -xp.exp(w[at + "A_log"]), B, C, w[at + "D"]
    y = subquad.selective_scan(*model, z=z) + subquad.selective_scan(*model, z=z, reverse=True)
    return dense(w, at + "Dense_3", y)


def dense(w: Mapping[str, Any], name: str, x: Any) -> Any:
    """An affine map."""
    return x @ w[name + "__kernel"] + w[name + "__bias"]


def normed(w: Mapping[str, Any], name: str, x: Any) -> Any:
    """Layer norm, with the ε of Flax."""
    xp = array_namespace(x)
    x = x - xp.mean(x, axis=-1, keepdims=True)
    scale = xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x / scale * w[name + "__scale"] + w[name + "__bias"]


def softplus(x: Any) -> Any:
    """log(1 + exp(x)) without overflow."""
    xp = array_namespace(x)
    return xp.maximum(x, xp.zeros_like(x)) + xp.log1p(xp.exp(-xp.abs(x)))


def halves(x: Any) -> tuple[Any, Any]:
    """The left and the right half of the channels."""
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def runners(w: Mapping[str, np.ndarray]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """`logits` on each library that is installed, from tokens to logits of NumPy."""
    found: dict[str, Callable[[np.ndarray], np.ndarray]] = {"NumPy": lambda ids: logits(w, ids[None])[0]}
    if importlib.util.find_spec("torch"):
        import torch

        of_torch = {name: torch.from_numpy(x) for name, x in w.items()}
        found["PyTorch"] = lambda ids: logits(of_torch, torch.from_numpy(ids[None]))[0].numpy()
    if importlib.util.find_spec("jax"):
        import jax

        of_jax = {name: jax.numpy.asarray(x) for name, x in w.items()}
        compiled = jax.jit(logits)
        found["JAX"] = lambda ids: np.asarray(compiled(of_jax, ids[None])[0])
    return found


def originals() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """The package's own two ways on a CPU: its network in ONNX Runtime, and its code in NumPy."""
    import onnxruntime
    from typeseg._numpy_backend import mamba_forward
    from typeseg._runtime import _weights

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    session, arrays = onnxruntime.InferenceSession(data("mamba_al.onnx"), options), _weights("mamba_al.npz")
    return {
        "its ONNX Runtime": lambda ids: session.run(None, {"ids": ids})[0],
        "its NumPy code": lambda ids: mamba_forward(arrays, ids),
    }


def compare(n: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds for n bytes of text, the least of some rounds in turn, and the distance to ONNX Runtime's logits."""
    here = Path(__file__).read_text()
    ids = np.resize(tokens(here), n)
    ways = runners(weights()) | originals()
    outs = {name: run(ids) for name, run in ways.items()}  # compiles too
    taken = dict.fromkeys(ways, np.inf)
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run(ids)
            taken[name] = min(taken[name], time.perf_counter() - start)
    expected = outs["its ONNX Runtime"]
    size = float(abs(expected).max())
    return {
        name: {"seconds": taken[name], "difference": float(abs(out - expected).max()) / size}
        for name, out in outs.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 2048, 8192], help="bytes of text")
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts (default: 5)")
    parser.add_argument("--out", type=Path, default=FILE, help="where the JSON goes")
    options = parser.parse_args(argv)
    labels = json.loads(data("manifest.json").read_text())["labels"]
    scores = np.exp(logits(weights(), tokens(TEXT)[None])[0])
    shares = scores / scores.sum(axis=-1, keepdims=True)
    start = 0
    for line in TEXT.splitlines(keepends=True):
        share = shares[start : start + len(line)].mean(axis=0)
        if line.strip():
            print(f"{labels[share.argmax()]:15} {share.max():.2f}  {line.rstrip()}")
        start += len(line)
    often = np.argsort(-shares.mean(axis=0))[:5]
    facts: dict[str, Any] = {"text": TEXT, "shares": {labels[i]: shares[:, i].round(3).tolist() for i in often}}
    facts["times"] = {n: compare(n, options.rounds) for n in options.lengths}
    for n, ways in facts["times"].items():
        for name, found in ways.items():
            print(f"{n:6} {name:17} {1e3 * found['seconds']:8.1f} ms  difference {found['difference']:.1e}")
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
