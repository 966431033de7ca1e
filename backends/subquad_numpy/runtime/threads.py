"""Tasks over threads: the caller's own and a small shared pool.

Kernels run without the interpreter lock, so plain Python threads suffice: each takes shares of the tasks in compiled
code (`native_tasks`) until none is left. So two threads may call at once, next to the pools of other libraries, and
after a fork.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from subquad_numpy.runtime.addresses import address_of

if TYPE_CHECKING:
    from subquad_numpy.codegen.compile import Kernel

KEEPS_CORES, HAS_AFFINITY = sys.platform == "linux", hasattr(os, "sched_getaffinity")
CORES = os.cpu_count() or 1
_limits: dict[tuple[bytes | None, bytes | None], int] = {}  # (NUMBA_NUM_THREADS, OMP_NUM_THREADS) → threads


class Team(int):
    """A number of threads of another library, which run tasks in place of the pool of this module."""

    def run(self, kernel: Kernel, tasks: int, records: np.ndarray) -> None:
        """Run all tasks of a call on these threads."""
        raise NotImplementedError


def thread_count(threads: int | None = None) -> int:
    """`threads` if given, else the minimum of OMP_NUM_THREADS, NUMBA_NUM_THREADS and the cores of this process."""
    if threads is not None:
        return threads
    asked = _getenv(b"NUMBA_NUM_THREADS"), _getenv(b"OMP_NUM_THREADS")
    limit = _limits.get(asked)
    if limit is None:
        firsts = ((x or b"").split(b",")[0].strip() for x in asked)
        limit = _limits[asked] = min([CORES, *(int(x) for x in firsts if x.isdigit() and int(x) > 0)])
    cores = len(os.sched_getaffinity(0)) if HAS_AFFINITY else limit
    return cores if cores < limit else limit


class _Work:
    """The tasks of one call, which any number of threads do share by share, and the memory that its records point to.

    Every thread holds a reference to this object while it works. If an interrupt ends the caller early, the arrays
    therefore stay in memory until the last share is done.
    """

    def __init__(self, kernel: Any, tasks: int, records: np.ndarray, threads: int, memory: Any) -> None:
        from subquad_numpy.runtime.native_tasks import words_for, worker

        self.words = words_for(kernel, tasks, records, threads)
        self.address = address_of(self.words)
        self.take_shares = worker().take_shares
        self.memory: Any = kernel, records, memory
        self.finished = threading.Lock()
        self.finished.acquire()

    def __call__(self) -> None:
        """Do shares until none is left; the thread that does the last one releases `finished`."""
        if self.take_shares(self.address):
            self.finished.release()


class _Pool:
    """Threads that wait for work; more threads are started when these are too few."""

    def __init__(self) -> None:
        self.waiting: SimpleQueue[_Work] = SimpleQueue()
        self.members: list[int] = []  # thread numbers of the operating system
        self.started, self.largest = 0, max(1, (os.cpu_count() or 2) - 1)

    def help(self, work: _Work, helpers: int) -> None:
        """Let up to `helpers` threads take part in the work, as soon as they are free."""
        wanted = helpers + self.waiting.qsize()
        try:
            while self.started < wanted and self.started < self.largest:
                threading.Thread(target=self._serve, name="subquad", daemon=True).start()
                self.started += 1
        except RuntimeError:  # no thread can be started, or the interpreter is shutting down: the caller does all
            pass
        for _ in range(helpers if helpers < self.started else self.started):
            self.waiting.put(work)

    def _serve(self) -> None:
        self.members.append(threading.get_native_id())
        while True:
            self.waiting.get()()


pools: list[_Pool] = []


def run_tasks(kernel: Any, tasks: int, records: np.ndarray, threads: int, memory: Any) -> None:
    """Run `kernel(first, last, records)` over all tasks; `memory` holds what the records point to.

    Each thread takes the next share of tasks when it has finished one, so a thread that other work slows down does
    less. The caller takes part, hence need not wait for a busy pool, and no thread of the pool waits for another.
    """
    if threads <= 1 or tasks <= 1:
        kernel(0, tasks, address_of(records))
        return
    if isinstance(threads, Team):
        threads.run(kernel, tasks, records)
        return
    from subquad_numpy.runtime.native_tasks import FAILED, NEXT

    threads = tasks if tasks < threads else threads
    work = _Work(kernel, tasks, records, threads, memory)
    if not pools:
        pools.append(_Pool())
    pool = pools[-1]
    if KEEPS_CORES:
        _part_from_caller(pool)
    try:
        pool.help(work, threads - 1)
        work()
        work.finished.acquire()
        work.memory = None
    finally:
        work.words[NEXT] = tasks  # after an interrupt, no thread begins another share
    if work.words[FAILED]:
        msg = "a compiled kernel found no memory for its scratch"
        raise MemoryError(msg)


def _part_from_caller(pool: _Pool) -> None:
    """Keep the pool's threads off the core of the caller.

    The operating system wakes a thread on the core of its waker, and moves it once another core is idle. But threads
    of other libraries wait for work by spinning, longer than a call of ours lasts, so that no core becomes idle.
    """
    others = os.sched_getaffinity(0) - {current_core()}
    try:
        for member in pool.members if others else ():
            os.sched_setaffinity(member, others)
    except OSError:  # the process may not set affinities, or a thread has ended: placement is a hint only
        pass


def _getenv(name: bytes) -> bytes | None:
    """The present value of a variable of the environment, or None."""
    value = os.environ.get(name.decode())
    return None if value is None else value.encode()


if sys.platform == "linux":
    current_core = ctypes.CDLL(None).sched_getcpu
    _getenv = ctypes.PyDLL(None).getenv  # reads one variable faster than `os.environ`
    _getenv.argtypes, _getenv.restype = (ctypes.c_char_p,), ctypes.c_char_p
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pools.clear)  # threads do not survive a fork
