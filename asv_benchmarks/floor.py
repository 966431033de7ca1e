"""`python -m asv_benchmarks.floor`: each operator's time as a multiple of its floor on this machine.

The floor of an operator is the time of its matrix products and exponentials alone, at the rates that the same library
reaches in the same run, one after the other on blocks that fit the cache. Products of `rows × d` by `d × m` and the
exponentials of `rows × m` are what FAVOR+ and Nyström attention are made of: per head and direction (queries, keys)
two products and one exponential of n × m each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import subquad

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

            calls = {"ours": run, **dict(zip(("matmul", "exp", "copy"), rates(library, m), strict=True))}
            if name == "favor":
                calls["causal"] = lambda run=run: run(causal=True)
            blocks = HEADS * args.n // ROWS
            seconds = _interleaved(calls, args.repeat, inner={"matmul": blocks, "exp": blocks, "copy": blocks})
            matmul, exp = 4 * seconds["matmul"], 2 * seconds["exp"]
            bandwidth = 2 * 4 * HEADS * args.n * m / seconds["copy"] / 1e9
            row = (matmul, exp, matmul + exp, seconds["ours"])
            causal = f"{1e3 * seconds['causal']:.1f}" if "causal" in seconds else "–"
            cells = [*(f"{1e3 * x:.1f}" for x in row), f"{row[3] / row[2]:.2f}", causal, f"{bandwidth:.0f}"]
            table.add_row(f"{name} ({m}) on {library}", *cells)
    Console(width=120).print(table)


def _interleaved(calls: dict[str, Callable[[], Any]], repeat: int, inner: dict[str, int]) -> dict[str, float]:
    """Median seconds of each call, measured in turn; `inner` repeats a small call within one measurement."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for round_ in range(repeat + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(inner.get(name, 1)):
                    call()
                if round_:  # the first is the warm-up
                    found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
