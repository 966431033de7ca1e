"""The tasks of a call taken share by share by any number of native threads: what each of them runs.

`work(words)` takes the next share until none is left. Threads may begin at any time, or never.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir

from subquad_numpy._compile import DONE, Kernel
from subquad_numpy._vector import intrinsic, types

KERNEL, TASKS, SHARES, FRAME, NEXT, FAILED, SIZE = range(7)  # places in `words`, int64: addresses, numbers, counters
SHARES_OF_THREAD = 8  # one that something else holds up does less


@intrinsic
def fetch_add(typingctx: Any, memory: Any, index: Any, value: Any) -> Any:
    """Add to memory[index], and return what it was, as one operation among threads."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        memory, index, value = args
        return builder.atomic_rmw("add", builder.gep(memory, [index]), value, "seq_cst")

    return types.int64(memory, types.intp, types.int64), codegen


@intrinsic
def call_kernel(typingctx: Any, address: Any, first: Any, last: Any, frame: Any) -> Any:
    """Call a kernel by its address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word, word, word])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


@cache
def worker() -> Any:
    """Compile `work(words)`."""

    @numba.cfunc("void(CPointer(int64))", cache=True, error_model="numpy")
    def work(words: Any) -> None:
        while True:
            share = fetch_add(words, NEXT, 1)
            if share >= words[SHARES]:
                return
            first = words[TASKS] * share // words[SHARES]
            last = words[TASKS] * (share + 1) // words[SHARES]
            if call_kernel(words[KERNEL], first, last, words[FRAME]) != DONE:
                fetch_add(words, FAILED, 1)

    return work


def words_for(kernel: Kernel, tasks: int, frame: np.ndarray, threads: int) -> np.ndarray:
    """What `work` takes, for about so many threads; `frame` must outlive it."""
    words = np.zeros(SIZE, np.int64)
    words[:NEXT] = kernel.address, tasks, min(tasks, SHARES_OF_THREAD * threads), frame.ctypes.data
    return words
