"""The clock of every comparison and benchmark."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

LEAST = 2  # min number of rounds, however long they take
# Seconds to wait before measuring: threads of earlier computations spin on for some 50 ms on the cores to measure.
PAUSE = 0.1


def seconds(call: Callable[[], Any], count: int = 1) -> float:
    """Mean time of one call, in seconds, from `count` calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def interleave(
    calls: Mapping[str, Callable[[], Any]], rounds: int, *, enough: float = math.inf, least: int = LEAST,
    alone: bool = False, first: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """The times of each call in seconds, one for each round, after one call of each that is not timed.

    A call of minutes may have a shorter one in `first`, by its name, that is called in place of it before all rounds.

    The calls take turns, A B C A B C …, so that the drift of a shared machine reaches all of them. There are `rounds`
    rounds. After `enough` seconds the rounds stop earlier, but not before `least` rounds.

    Calls that are measured `alone` find neither threads of the call before, which spin on the cores that the next one
    needs, nor its numbers in the caches: each waits until these threads sleep, and runs once before it is timed.
    """
    for name, call in calls.items():
        (first or {}).get(name, call)()
    time.sleep(PAUSE)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + enough
    for done in range(rounds):
        if done >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if alone:
                time.sleep(PAUSE)
                call()
            times[name].append(seconds(call))
    return times
