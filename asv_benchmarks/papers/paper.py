"""What a table of times against the sequence length is made of, and how it is measured."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from asv_benchmarks import harness


@dataclass(frozen=True)
class Row:
    """One way to compute it: `make(n)` gives a call of no arguments; beyond `longest` it takes too long here.

    `group` parts the rows of a table that has several quantities, such as forward and backward.
    """

    name: str
    make: Callable[[int], harness.Run]
    longest: int
    group: str = ""


@dataclass(frozen=True)
class Paper:
    """One table. Ratios are taken to the first of `baselines`, at the length `summary` to each of them.

    `instance_bytes` is the size of inputs and output for each token: with it, memory is measured as well.
    """

    title: str
    source: str
    rows: Sequence[Row]
    lengths: Sequence[int]
    quick: Sequence[int]
    packages: Sequence[str]
    baselines: Sequence[str]
    notes: Sequence[str] = ()
    summary: int | None = None
    instance_bytes: int | None = None


def times(paper: Paper, lengths: Sequence[int], repeat: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Milliseconds of each row at each length: the rows of one length in turn, `seconds` for each length.

    The summary's length, whose ratios are quoted, has all of its rounds whatever they take.
    """
    for n in lengths:
        rows = {f"{row.group}: {row.name}": row for row in paper.rows if n <= row.longest}
        sys.stderr.write(f"n = {n}: {len(rows)} rows\n")
        enough = math.inf if n == paper.summary else seconds
        found = harness.interleave({key: row.make(n) for key, row in rows.items()}, repeat, enough=enough)
        for key, row in rows.items():
            spread, rounds = harness.spread([1e3 * x for x in found[key]]), len(found[key])
            yield {"name": row.name, "group": row.group, "n": n, "rounds": rounds, "ms": spread}
        gc.collect()
