"""Errors of Nyström attention by its landmarks, on heads of trained models, without causal mask.

    python -m asv_benchmarks.quality.landmarks FILE.npz … --minilm

Each file holds the arrays q (heads, n, d) and k and v (fewer heads, n, d) of one layer; query heads share key heads in
order. With --minilm also all heads of MiniLM, on 2048 tokens: four stretches of 512 in a row. The error of a head is
‖out − exact‖ / ‖exact‖, in float64. The first number is the mean over heads, then come its share of that of segment
means, the same of medians, and the median time of a call in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import subquad
from asv_benchmarks import harness
from asv_benchmarks.quality import console

Array = np.ndarray[Any, Any]
Layer = tuple[Array, Array, Array]
METHODS: dict[str, dict[str, Any]] = {
    "segment means": {},
    "kmeans": {"landmarks": "kmeans"},
    "ridge-fit": {"landmarks": "kmeans", "pinv": "ridge-fit"},
}
STRETCHES, N = 4, 512


def read(path: Path) -> Layer:
    """(q, k, v) of a file, float64."""
    with np.load(path) as found:
        q, k, v = (found[name].astype(np.float64) for name in "qkv")
    return q, k, v


def errors(layers: Iterable[Layer], options: dict[str, Any]) -> list[float]:
    """The error of each head of some layers."""
    found: list[float] = []
    for q, k, v in layers:
        exact = subquad.attention(q, k, v, "exact")
        found += harness.head_errors(subquad.attention(q, k, v, "nystrom", **options), exact)
    return found


def times(layer: Layer, m: int, repeat: int) -> dict[str, float]:
    """Median seconds of one call of each method on a layer in float32; the methods take turns."""
    q, k, v = (x.astype(np.float32) for x in layer)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda options=options: subquad.attention(q, k, v, "nystrom", num_landmarks=m, **options)  # type: ignore[misc]
        for name, options in METHODS.items()
    }
    return {name: statistics.median(found) for name, found in harness.interleave(calls, repeat).items()}


def table(layers: list[Layer], m: int, repeat: int) -> Iterator[list[str]]:
    """A row for each method: name, mean error, its share of segment means', the same of medians, milliseconds."""
    seconds, first = times(layers[0], m, repeat), [1.0]
    for name, options in METHODS.items():
        found = errors(layers, {"num_landmarks": m, **options})
        first = found if name == "segment means" else first
        shares = (f(found) / f(first) for f in (statistics.mean, statistics.median))
        yield [name, f"{statistics.mean(found):.3f}", *(f"{x:.3f}" for x in shares), f"{1000 * seconds[name]:.1f}"]


def minilm_layers() -> list[Layer]:
    """The layers of MiniLM on the text to report on."""
    import torch

    from asv_benchmarks.quality import minilm, texts

    found: list[Layer] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        a, b, c = (x.transpose(0, 1).flatten(1, 2).double().numpy() for x in (q, k, v))
        found.append((a, b, c))
        return minilm.exact(q, k, v, layer)

    encoder = minilm.MiniLM()
    encoder.embed(encoder.chunks(texts.read("prose", "report"), STRETCHES, N), attend)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m asv_benchmarks.quality.landmarks", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("files", type=Path, nargs="*", metavar="FILE.npz", help="arrays q, k and v of a layer")
    add("--minilm", action="store_true", help="all heads of MiniLM too")
    add("--landmarks", type=int, default=64, metavar="M", help="default: %(default)s")
    add("--repeat", type=int, default=5, help="rounds of the clock (default: %(default)s)")
    add("--threads", type=int, help="of PyTorch and subquad (default: the cores of this process)")
    args = parser.parse_args()
    if not args.files and not args.minilm:
        parser.error("name files, or --minilm")
    harness.use_threads(args.threads)
    try:
        every = [read(path) for path in args.files]
        groups = {path.stem: [layer] for path, layer in zip(args.files, every, strict=True)}
        groups |= {"all files": every} if len(every) > 1 else {}
        groups |= {"MiniLM-L6": minilm_layers()} if args.minilm else {}
    except FileNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for title, layers in groups.items():
        header = ["method", "mean error", "of that of segment means", "of medians", "ms of a layer"]
        console.show(title, header, table(layers, args.landmarks, args.repeat))
    return 0


if __name__ == "__main__":
    sys.exit(main())
