"""Interleaved timing: A B A B … in one process, so that the drift of a shared machine falls on all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Run = Callable[[], Any]


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


def interleave(ours: Run, theirs: Run, repeat: int = 7) -> Comparison:
    """Time both in turn, after one warm-up of each."""
    times = rotate({"ours": ours, "theirs": theirs}, repeat)
    mine, other = times["ours"], times["theirs"]
    ratios = [b / a for a, b in zip(mine, other, strict=True)]
    return Comparison(Spread.of(mine), Spread.of(other), Spread.of(ratios))


def rotate(calls: Mapping[str, Run], repeat: int, seconds: float = float("inf")) -> dict[str, list[float]]:
    """Seconds of each call, all in turn, after one warm-up of each: `repeat` rounds, or fewer after `seconds`."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for done in range(repeat):
        if done >= 2 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            times[name].append(_seconds(call))
    return times


def _seconds(call: Run) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
