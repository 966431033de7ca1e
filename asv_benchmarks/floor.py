"""`python -m asv_benchmarks.floor`: each operator's time as a multiple of its floor on this machine.

The floor of an operator is the time of its matrix products and exponentials alone, at the rates that the same library
reaches in the same run, one after the other on blocks that fit the cache. Products of `rows × d` by `d × m` and the
exponentials of `rows × m` are what FAVOR+ and Nyström attention are made of: per head and direction (queries, keys)
two products and one exponential of n × m each.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import subquad
from asv_benchmarks.peers.timing import rotate

HEADS, D, ROWS = 8, 64, 1024
OPERATORS = {"favor": ("num_features", 256), "nystrom": ("num_landmarks", 64)}


def rates(library: str, m: int) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """Calls that multiply, exponentiate and copy one block of ROWS × m."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((ROWS, D), dtype=np.float32), rng.standard_normal((D, m), dtype=np.float32)
    y, other = np.empty((ROWS, m), np.float32), np.zeros((ROWS, m), np.float32)
    if library == "numpy":
        return lambda: np.matmul(x, w, out=y), lambda: np.exp(other, out=y), lambda: np.copyto(y, other)
    tx, tw, ty, to = map(torch.from_numpy, (x, w, y, other))
    return lambda: torch.mm(tx, tw, out=ty), lambda: torch.exp(to, out=ty), lambda: ty.copy_(to)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.floor", description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    host = rng.standard_normal((3, 1, HEADS, args.n, D), dtype=np.float32)
    title = f"(1, {HEADS}, {args.n}, {D}) float32, {torch.get_num_threads()} threads, medians of {args.repeat}"
    columns = ("matmul / ms", "exp / ms", "floor / ms", "ours / ms", "multiple", "causal / ms", "copy GB/s")
    table = Table("operator", *columns, title=title)
    for name, (option, m) in OPERATORS.items():
        for library, convert in (("numpy", np.asarray), ("torch", torch.from_numpy)):
            q, k, v = map(convert, host)

            def run(causal: bool = False, name: str = name, option: str = option, m: int = m) -> Any:
                return subquad.attention(q, k, v, name, causal=causal, **{option: m})  # noqa: B023

            blocks = [_often(call, HEADS * args.n // ROWS) for call in rates(library, m)]
            calls = {"ours": run, **dict(zip(("matmul", "exp", "copy"), blocks, strict=True))}
            if name == "favor":
                calls["causal"] = lambda run=run: run(causal=True)
            with torch.no_grad():
                seconds = {key: statistics.median(x) for key, x in rotate(calls, args.repeat).items()}
            matmul, exp = 4 * seconds["matmul"], 2 * seconds["exp"]
            bandwidth = 2 * 4 * HEADS * args.n * m / seconds["copy"] / 1e9
            row = (matmul, exp, matmul + exp, seconds["ours"])
            causal = f"{1e3 * seconds['causal']:.1f}" if "causal" in seconds else "–"
            cells = [*(f"{1e3 * x:.1f}" for x in row), f"{row[3] / row[2]:.2f}", causal, f"{bandwidth:.0f}"]
            table.add_row(f"{name} ({m}) on {library}", *cells)
    Console(width=120).print(table)


def _often(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


if __name__ == "__main__":
    main()
