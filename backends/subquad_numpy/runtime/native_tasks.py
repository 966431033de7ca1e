"""The function that every thread of a call runs, in compiled code: `work(words)`.

`work` takes the next share of the call's tasks until none is left. A thread may begin at any time, or never.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir

from subquad_numpy.codegen import inline, intrinsic, types
from subquad_numpy.codegen.compile import DONE, compiled_address
from subquad_numpy.runtime.addresses import address_of

# Places in `words`, which all threads of a call share, int64:
#     KERNEL, RECORDS             addresses of the kernel and of the argument records
#     TASKS, SHARES               how many tasks, and into how many shares they are cut
#     NEXT, FINISHED, FAILED      counters: the next share to take, shares done, shares without memory for scratch
#     ARRIVED, TEAM               counter of threads that have begun; how many are expected (0: nobody waits for them)
#     CALLER, CORE                the calling thread, and the core that it runs on
KERNEL, TASKS, SHARES, RECORDS, NEXT, FINISHED, FAILED, ARRIVED, TEAM, CALLER, CORE, SYSTEM, SIZE = *range(12), 16
SELF, YIELD, GET_CORE, GET_CORES, SET_CORES = range(SYSTEM, SIZE)  # addresses of functions of the operating system
SHARES_OF_THREAD = 8  # shares per thread: a thread slowed by other work takes fewer of them
MOST_CORES = 8192  # bits of a set of cores, as the operating system takes it
CORE_WORDS = MOST_CORES >> 6
MOST_YIELDS = 1000  # yields before giving up on threads that OpenMP did not start, about 0.3 ms


@intrinsic
def fetch_add(memory: Any, index: Any, value: Any) -> Any:
    """Add to memory[index] and return the number before, as one atomic operation."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        memory, index, value = args
        return builder.atomic_rmw("add", builder.gep(memory, [index]), value, "seq_cst")

    return types.int64(memory, types.intp, types.int64), codegen


@intrinsic
def call(address: Any, first: Any, second: Any, third: Any) -> Any:
    """Call the function at an address with up to three integers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * 3)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


@inline
def _leave_core(words: Any) -> None:
    """Move this thread to another core, then allow it all of its cores again."""
    own, others = np.zeros(CORE_WORDS, np.int64), np.zeros(CORE_WORDS, np.int64)  # sets of cores: one bit for each
    size = 8 * CORE_WORDS
    if words[CORE] < MOST_CORES and call(words[GET_CORES], 0, size, own.ctypes.data) & 0x80000000 == 0:
        there_are_others = False
        for i in range(CORE_WORDS):
            mine = 1 << (words[CORE] & 63) if words[CORE] >> 6 == i else 0
            others[i] = own[i] & ~mine
            there_are_others = there_are_others or others[i] != 0
        if there_are_others:
            call(words[SET_CORES], 0, size, others.ctypes.data)
            call(words[SET_CORES], 0, size, own.ctypes.data)


class Worker:
    """The compiled `work(words)`: its address, and `take_shares`, a Python function of the address of `words`.

    `take_shares` returns whether this thread did the last share.
    """

    def __init__(self, address: int) -> None:
        self.address = address
        self.take_shares = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address)


@cache
def worker() -> Worker:
    """Compile `work(words)`.

    OpenMP's threads wait for each other by spinning, for milliseconds. A thread that the operating system has put on
    the caller's core would hold up the whole team, so the caller yields to it and it moves to another core.
    """

    def work(words: Any) -> int:
        fetch_add(words, ARRIVED, 1)
        is_caller = words[TEAM] > 0 and call(words[SELF], 0, 0, 0) == words[CALLER]
        if is_caller:
            call(words[YIELD], 0, 0, 0)
        elif words[TEAM] > 0 and call(words[GET_CORE], 0, 0, 0) & 0xFFFFFFFF == words[CORE]:
            _leave_core(words)
        did_last = 0
        while True:
            share = fetch_add(words, NEXT, 1)
            if share >= words[SHARES]:
                break
            first = words[TASKS] * share // words[SHARES]
            last = words[TASKS] * (share + 1) // words[SHARES]
            if call(words[KERNEL], first, last, words[RECORDS]) != DONE:
                fetch_add(words, FAILED, 1)
            if fetch_add(words, FINISHED, 1) == words[SHARES] - 1:
                did_last = 1
        if is_caller:  # let late threads begin, and see that no share is left, before OpenMP waits for them
            for _ in range(MOST_YIELDS):
                if fetch_add(words, ARRIVED, 0) >= words[TEAM]:
                    break
                call(words[YIELD], 0, 0, 0)
        return did_last

    return Worker(compiled_address(work, "work", [types.CPointer(types.int64)]))


@cache
def scheduler() -> list[int]:
    """The addresses of the functions `SELF` … `SET_CORES`, in that order; of 0 where the system has not all of them."""
    names = ("pthread_self", "sched_yield", "sched_getcpu", "sched_getaffinity", "sched_setaffinity")
    found = [getattr(ctypes.CDLL(None), name, None) for name in names]
    return [0 if None in found else ctypes.cast(x, ctypes.c_void_p).value or 0 for x in found]


def shares_for(tasks: int, threads: int) -> int:
    """Into how many shares tasks are cut: a few tasks one by one, since a last share of two keeps others waiting."""
    return tasks if tasks < 2 * SHARES_OF_THREAD * threads else SHARES_OF_THREAD * threads


def words_for(kernel: Any, tasks: int, records: np.ndarray, threads: int) -> np.ndarray:
    """The `words` of a call, with shares for about so many threads; `records` must outlive them."""
    words = np.zeros(SIZE, np.int64)
    words[:NEXT] = kernel.address, tasks, shares_for(tasks, threads), address_of(records)
    return words
