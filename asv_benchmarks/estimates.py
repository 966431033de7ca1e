"""`python -m asv_benchmarks.estimates`: the time of an estimate beyond the method's own, as a share of exact attention.

128 sampled rows of n take 128 / n of exact attention, and where a row sees half of the keys on average half of that,
as exact attention does. What is above that share is the rest of an estimate. Pairs of calls follow each other, and the
median of their differences counts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings
from functools import partial
from typing import Any

import numpy as np

import subquad
from asv_benchmarks import harness

METHOD, OPTIONS = "window", {"left": 16}  # a cheap one, whose time is subtracted
D = 64


def calls(backend: str, heads: int, n: int, *, causal: bool) -> dict[str, harness.Run]:
    """Functions to be timed: "exact", "method", and "estimate", which runs the method once too."""
    arrays = np.random.default_rng(0).standard_normal((3, 1, heads, n, D), dtype=np.float32)
    target = harness.target(backend)

    def estimate(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        return tuple(subquad.estimate_error(METHOD, q, k, v, causal=causal, **OPTIONS)[:-1])

    functions = {
        "exact": partial(subquad.attention, method="exact", causal=causal),
        "method": partial(subquad.attention, method=METHOD, causal=causal, **OPTIONS),
        "estimate": estimate,
    }
    prepared = {name: harness.Prepared(target, function, tuple(arrays)) for name, function in functions.items()}
    return {name: x.run for name, x in prepared.items()}


def share(times: dict[str, list[float]]) -> float:
    """Median of what an estimate takes beyond the method's own pass, divided by the time of exact attention."""
    more = [one - own for one, own in zip(times["estimate"], times["method"], strict=True)]
    return statistics.median(more) / statistics.median(times["exact"])


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.estimates", description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    warnings.simplefilter("ignore", subquad.PoorApproximation)
    title = f"(1, {args.heads}, {args.n}, {D}) float32, 128 rows, medians of {args.repeat}"
    table = Table("library", "causal", "exact / ms", "estimate / ms", "share / %", title=title)
    for backend, causal in itertools.product(harness.backends(), (False, True)):
        try:
            times = harness.interleave(calls(backend, args.heads, args.n, causal=causal), args.repeat)
        except NotImplementedError:
            continue
        own = statistics.median(times["estimate"]) - statistics.median(times["method"])
        cells = [f"{1e3 * statistics.median(times['exact']):.1f}", f"{1e3 * own:.2f}", f"{100 * share(times):.1f}"]
        table.add_row(backend, "yes" if causal else "no", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
