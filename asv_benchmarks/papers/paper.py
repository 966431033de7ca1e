"""Tables of times against the sequence length: their rows, and how they are measured."""

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
    """One implementation: `make(n)` returns a call without arguments; lengths beyond `longest` take too long.

    `group` names the quantity if a table has several, such as forward and backward.
    """

    name: str
    make: Callable[[int], harness.Run]
    longest: int
    group: str = ""


@dataclass(frozen=True)
class Paper:
    """One table. Ratios refer to the first of `baselines`, and at the length `summary` to each of them.

    `instance_bytes` is the size of inputs and output for each token. If it is given, memory is measured as well.
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
    """The times of each row at each length, in ms: the rows of one length take turns, for up to `seconds` seconds.

    The length `paper.summary`, whose ratios are quoted, gets all `repeat` rounds, however long they take.
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
