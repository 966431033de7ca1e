"""The function that every thread of a call runs, in compiled code: `work(words)`.

`work` takes the next share of the call's tasks until none is left. A thread may begin at any time, or never.
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
MOST_YIELDS = 1000  # yields before giving up on threads that OpenMP did not start, about 0.3 ms


@intrinsic
def fetch_add(typingctx: Any, memory: Any, index: Any, value: Any) -> Any:
    """Add to memory[index] and return the number before, as one atomic operation."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        memory, index, value = args
        return builder.atomic_rmw("add", builder.gep(memory, [index]), value, "seq_cst")

    return types.int64(memory, types.intp, types.int64), codegen


@intrinsic
def call(typingctx: Any, address: Any, first: Any, second: Any, third: Any) -> Any:
    """Call the function at an address with up to three integers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * 3)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _leave_core(words: Any) -> None:
    """Move this thread to another core, then allow it all of its cores again."""
    own = np.zeros(MOST_CORES >> 6, np.int64)  # a set of cores: one bit for each
    if words[CORE] >= MOST_CORES or call(words[GET_CORES], 0, MOST_CORES >> 3, own.ctypes.data) & 0x80000000:
        return
    others = own.copy()
    others[words[CORE] >> 6] &= ~(np.int64(1) << (words[CORE] & 63))
    if others.any():
        call(words[SET_CORES], 0, MOST_CORES >> 3, others.ctypes.data)
        call(words[SET_CORES], 0, MOST_CORES >> 3, own.ctypes.data)


class Worker:
    """The compiled `work(words)`: its address, and `take_shares`, a Python function of the address of `words`.

    `take_shares` returns whether this thread did the last share.
    """

    def __init__(self, native: Any) -> None:
        self.address: int = native.address
        self.take_shares = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(native.address)
        self._native = native  # keeps the code


@cache
def worker() -> Worker:
    """Compile `work(words)`.

    OpenMP's threads wait for each other by spinning, for milliseconds. A thread that the operating system has put on
    the caller's core would hold up the whole team, so the caller yields to it and it moves to another core.
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

    return Worker(work)


def words_for(kernel: Any, tasks: int, records: np.ndarray, threads: int) -> np.ndarray:
    """The `words` of a call, with shares for about so many threads; `records` must outlive them."""
    words = np.zeros(SIZE, np.int64)
    shares = SHARES_OF_THREAD * threads
    shares = tasks if tasks < shares else shares
    words[:NEXT] = kernel.address, tasks, shares, address_of(records)
    return words
