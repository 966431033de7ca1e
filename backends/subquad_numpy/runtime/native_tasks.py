"""The tasks of a call taken share by share by any number of native threads: what each of them runs.

`work(words)` takes the next share until none is left. Threads may begin at any time, or never.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir

from subquad_numpy.codegen.compile import DONE, native
from subquad_numpy.codegen.vector_type import intrinsic, types

# places in `words`, int64: addresses, numbers, counters
KERNEL, TASKS, SHARES, FRAME, NEXT, FINISHED, FAILED, ARRIVED, TEAM, CALLER, CORE, SYSTEM, SIZE = *range(12), 16
SELF, YIELD, GET_CORE, GET_CORES, SET_CORES = range(SYSTEM, SIZE)  # functions of the system
SHARES_OF_THREAD = 8  # one that something else holds up does less
MOST_CORES = 8192  # as the system counts them
MOST_YIELDS = 1000  # some 0.3 ms: the team may be smaller than it was to be


@intrinsic
def fetch_add(typingctx: Any, memory: Any, index: Any, value: Any) -> Any:
    """Add to memory[index], and return what it was, as one operation among threads."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        memory, index, value = args
        return builder.atomic_rmw("add", builder.gep(memory, [index]), value, "seq_cst")

    return types.int64(memory, types.intp, types.int64), codegen


@intrinsic
def call(typingctx: Any, address: Any, first: Any, second: Any, third: Any) -> Any:
    """Call a function of up to three integers by its address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * 3)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _leave_core(words: Any) -> None:
    """Go to another core, and be free again to run on all that this thread may."""
    own = np.zeros(MOST_CORES >> 6, np.int64)
    if words[CORE] >= MOST_CORES or call(words[GET_CORES], 0, MOST_CORES >> 3, own.ctypes.data) & 0x80000000:
        return
    others = own.copy()
    others[words[CORE] >> 6] &= ~(np.int64(1) << (words[CORE] & 63))
    if others.any():
        call(words[SET_CORES], 0, MOST_CORES >> 3, others.ctypes.data)
        call(words[SET_CORES], 0, MOST_CORES >> 3, own.ctypes.data)


class Worker:
    """`work(words)` by its address, and for Python, where it says whether this thread did the last share."""

    def __init__(self, native: Any) -> None:
        self.address: int = native.address
        self.take_shares = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(native.address)
        self._native = native  # keeps the code


@cache
def worker() -> Worker:
    """Compile `work(words)`.

    Where `TEAM` threads are waited for by spinning, as OpenMP does for milliseconds, a thread that the system has put
    on the core of the first would hold up all: the first lets it run, and it leaves.
    """

    @native("int64(CPointer(int64))")
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
            if call(words[KERNEL], first, last, words[FRAME]) != DONE:
                fetch_add(words, FAILED, 1)
            if fetch_add(words, FINISHED, 1) == words[SHARES] - 1:
                did_last = 1
        if is_caller:
            for _ in range(MOST_YIELDS):
                if fetch_add(words, ARRIVED, 0) >= words[TEAM]:
                    break
                call(words[YIELD], 0, 0, 0)
        return did_last

    return Worker(work)


def words_for(kernel: Any, tasks: int, records: np.ndarray, threads: int) -> np.ndarray:
    """What `work` takes, for about so many threads; `records` must outlive it."""
    words = np.zeros(SIZE, np.int64)
    shares = SHARES_OF_THREAD * threads
    shares = tasks if tasks < shares else shares
    words[:NEXT] = kernel.address, tasks, shares, records.__array_interface__["data"][0]
    return words
