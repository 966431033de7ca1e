"""How threads share the tasks of a phase: two counters, of tasks taken and of tasks finished."""

from typing import Any

from subquad_numpy.codegen import inline
from subquad_numpy.runtime.native_tasks import call, fetch_add

PATIENCE = 2000  # looks at a counter before yielding, some 20 µs


@inline
def next_task(counters: Any, phase: int, finished: int) -> int:
    """The next task of a phase, after `finished` ones of this thread (0 or 1) are counted."""
    if finished:
        fetch_add(counters, 2 * phase + 1, 1)
    return fetch_add(counters, 2 * phase, 1)


@inline
def wait(counters: Any, phase: int, tasks: int, give_way: int) -> None:
    """Return when all tasks of a phase are finished; `give_way` is a function that lets another thread run, or 0."""
    looks = 0
    while fetch_add(counters, 2 * phase + 1, 0) < tasks:
        looks += 1
        if looks > PATIENCE and give_way != 0:
            call(give_way, 0, 0, 0)
