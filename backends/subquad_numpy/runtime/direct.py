"""A call of a kernel on the caller's thread, in one step from Python: addresses are read in compiled code.

A step of decoding is some microseconds long. To ask each array for its address takes as much time again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import pointer, types
from subquad_numpy.codegen.compile import address_of
from subquad_numpy.runtime.addresses import DATA
from subquad_numpy.runtime.arguments import FOREIGN
from subquad_numpy.runtime.native_tasks import call

# Places in the words of a call, int64: the address of the kernel; its tasks; the fields of its record; how many of
# these are numbers; the address of NumPy's class of arrays; then the fields: numbers, then array objects, or 0.
KERNEL, TASKS, FIELDS, NUMBERS, ARRAY, HEAD = range(6)
TYPE, NUMBERS_AT = DATA // 8 - 1, DATA // 8  # of an object, in words: its class; of an array: where its numbers are


@cache
def direct() -> Callable[[bytes], int]:
    """Compile the function of the words of a call, which runs all tasks, without the interpreter lock.

    It returns what the kernel does; or `FOREIGN`, with nothing done, if an object is no array of exactly NumPy's class.
    """
    kind, numbers_at = TYPE, NUMBERS_AT

    def run(words: Any) -> int:
        fields = words[FIELDS]
        record = np.empty(fields, np.int64)
        for i in range(fields):
            word = words[HEAD + i]
            if i >= words[NUMBERS] and word != 0:
                found = pointer(word, np.int64(0))
                if found[kind] != words[ARRAY]:
                    return FOREIGN
                word = found[numbers_at]
            record[i] = word
        done = call(words[KERNEL], 0, words[TASKS], record.ctypes.data)
        record[0] = 0  # see `codegen.pointers.aligned`
        return done

    address = address_of(run, "direct", [types.CPointer(types.int64)])
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(address)


def head_of(kernel: Any, tasks: int, numbers: np.ndarray, fields: int) -> bytes:
    """The words of a call but for its objects."""
    return np.array([kernel.address, tasks, fields, len(numbers), id(np.ndarray), *numbers], np.int64).tobytes()
