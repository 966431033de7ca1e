"""Interleaved timing: A B A B … in one process, so that the drift of a shared machine falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and extremes of a list of measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Comparison:
    """Seconds of two callables, and the ratio second / first, pair by pair."""

    ours: Spread
    theirs: Spread
    ratio: Spread


def interleave(ours: Callable[[], object], theirs: Callable[[], object], repeat: int = 7) -> Comparison:
    """Time both in turn, after one warm-up of each."""
    ours()
    theirs()
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(repeat)]
    mine, other = (list(column) for column in zip(*pairs, strict=True))
    return Comparison(Spread.of(mine), Spread.of(other), Spread.of([b / a for a, b in pairs]))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
