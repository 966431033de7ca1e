"""Tasks over a few threads: the caller's own and a small shared pool.

Kernels run without the interpreter lock, so plain Python threads suffice. No threading layer of Numba is
involved: two threads may call at once, next to the pools of other libraries, and after a fork.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from subquad_numpy.codegen.compile import Kernel

SHARES_OF_THREAD = 8  # one that something else holds up does less

_pools: list[ThreadPoolExecutor] = []
_members: list[int] = []  # threads of the pool, as the system knows them


class Team(int):
    """A number of threads that are not ours, and how they run tasks."""

    def run(self, kernel: Kernel, tasks: int, frame: np.ndarray) -> None:
        """Run all tasks."""
        raise NotImplementedError


def thread_count(threads: int | None = None) -> int:
    """As asked, else the least of OMP_NUM_THREADS, NUMBA_NUM_THREADS and the cores of this process."""
    if threads is not None:
        return threads
    import numba

    limit = int(numba.config.NUMBA_NUM_THREADS)
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        limit = min(limit, int(asked))
    if hasattr(os, "sched_getaffinity"):
        limit = min(limit, len(os.sched_getaffinity(0)))
    return max(1, limit)


class _Work:
    """Shares of the tasks of one call, done by whoever comes, and the memory that its frame points to.

    A thread of the pool holds the whole while it works: where an interrupt takes the caller away, with all of its
    arrays, the memory stays until the last share is done.
    """

    def __init__(self, kernel: Any, frame: np.ndarray, memory: Any, shares: list[tuple[int, int]]):
        self.kernel, self.frame, self.memory = kernel, frame, memory
        self.waiting, self.left = deque(shares), len(shares)
        self.done: list[tuple[int, int]] = []
        self.failed: list[Exception] = []
        self.finished = threading.Event()

    def __call__(self) -> None:
        while True:
            try:
                share = self.waiting.popleft()
            except IndexError:
                return
            try:
                self.kernel(*share, self.frame)
            except Exception as error:
                self.failed.append(error)
            self.done.append(share)
            if len(self.done) == self.left:
                self.finished.set()

    def wait(self) -> None:
        """Until every share is done. Threads are not asked: one may work that the pool said it could not start."""
        self.finished.wait()
        self.memory = None
        if self.failed:
            raise self.failed[0]


def run_tasks(kernel: Any, tasks: int, frame: np.ndarray, threads: int, memory: Any) -> None:
    """Run `kernel(first, last, frame)` over all tasks; `memory` holds what the frame points to.

    Each thread takes the next few tasks when it has finished the last: one that another library's waiting threads
    hold up does less. The caller takes part, and a busy pool delays nobody; no thread of the pool ever waits.
    """
    if min(threads, tasks) <= 1:
        kernel(0, tasks, frame)
        return
    if isinstance(threads, Team):
        threads.run(kernel, tasks, frame)
        return
    threads = min(threads, tasks)
    shares = min(tasks, SHARES_OF_THREAD * threads)
    work = _Work(kernel, frame, memory, list(pairwise([tasks * i // shares for i in range(shares + 1)])))
    if sys.platform == "linux":
        _part_from_caller()
    helpers = []
    try:
        with suppress(RuntimeError):  # no thread can be started, now or as the interpreter is shutting down
            for _ in range(threads - 1):
                helpers.append(_pool().submit(work))
        work()
        work.wait()
    finally:
        work.waiting.clear()  # of what an interrupt leaves, nothing more is begun
        for helper in helpers:
            helper.cancel()


def _pool() -> ThreadPoolExecutor:
    if not _pools:
        count = max(1, (os.cpu_count() or 2) - 1)
        _pools.append(ThreadPoolExecutor(count, "subquad", lambda: _members.append(threading.get_native_id())))
    return _pools[-1]


def _part_from_caller() -> None:
    """Keep the pool's threads off the core of the caller.

    The system wakes a thread where its waker runs, and moves it away once another core is idle. But the threads of
    other libraries wait for work by spinning, for as long as a whole call of ours lasts: no core is ever idle then.
    """
    others = os.sched_getaffinity(0) - {_current_core()}
    with suppress(OSError):  # it may be forbidden, or the pool be ending: no harm
        for member in _members if others else ():
            os.sched_setaffinity(member, others)


def _forget() -> None:
    _pools.clear()
    _members.clear()


if sys.platform == "linux":
    _current_core = ctypes.CDLL(None).sched_getcpu
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # threads do not survive a fork
