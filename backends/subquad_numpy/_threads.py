"""Tasks over a few threads: the caller's own and a small shared pool.

Kernels run without the interpreter lock, so plain Python threads suffice. No threading layer of Numba is
involved: two threads may call at once, next to the pools of other libraries, and after a fork.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np

_pools: list[ThreadPoolExecutor] = []


def thread_count(threads: int | None = None) -> int:
    """As asked, else the least of OMP_NUM_THREADS, NUMBA_NUM_THREADS and the cores of this process."""
    if threads is not None:
        return max(1, threads)
    limit = int(numba.config.NUMBA_NUM_THREADS)
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        limit = min(limit, int(asked))
    if hasattr(os, "sched_getaffinity"):
        limit = min(limit, len(os.sched_getaffinity(0)))
    return max(1, limit)


def run_tasks(kernel: Callable[..., None], tasks: int, frame: np.ndarray, threads: int) -> None:
    """Run `kernel(first, last, frame)` over all tasks, in equal shares.

    The caller takes the first share and then whatever the pool has not begun: a busy pool delays nobody, and
    no thread of the pool ever waits.
    """
    threads = min(threads, tasks)
    if threads <= 1:
        kernel(0, tasks, frame)
        return
    bounds = [tasks * i // threads for i in range(threads + 1)]
    waiting: list[tuple[Future[Any] | None, int, int]] = []
    for first, last in pairwise(bounds[1:]):
        try:
            waiting.append((_pool().submit(kernel, first, last, frame), first, last))
        except RuntimeError:  # the interpreter is shutting down
            waiting.append((None, first, last))
    kernel(0, bounds[1], frame)
    for future, first, last in reversed(waiting):
        if future is None or future.cancel():
            kernel(first, last, frame)
        else:
            future.result()


def _pool() -> ThreadPoolExecutor:
    if not _pools:
        _pools.append(ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), thread_name_prefix="subquad"))
    return _pools[-1]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork
