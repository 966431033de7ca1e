"""The clock of every comparison and benchmark."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

LEAST = 2  # rounds, however long they take
PAUSE = 0.1  # seconds; threads that computed before spin on for some 50 ms, on cores that are to be measured


def seconds(call: Callable[[], Any], count: int = 1) -> float:
    """Seconds that one call takes, from `count` of them in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def interleave(
    calls: Mapping[str, Callable[[], Any]], rounds: int, *, enough: float = math.inf, least: int = LEAST
) -> dict[str, list[float]]:
    """Seconds of each call, round by round, after one call of each that is not counted.

    The calls take turns, A B C A B C …, so that the drift of a shared machine falls on all of them. There are
    `rounds` rounds, or fewer once the rounds have taken `enough` seconds, but never fewer than `least`.
    """
    for call in calls.values():
        call()
    time.sleep(PAUSE)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + enough
    for done in range(rounds):
        if done >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times
