"""A call of a kernel on the caller's thread, in one step from Python: argument records are made in compiled code.

A step of decoding is some microseconds long. To ask each array for its address takes as much time again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import copy, pointer, types
from subquad_numpy.codegen.compile import compiled_address
from subquad_numpy.runtime.addresses import DATA, address_of
from subquad_numpy.runtime.arguments import FOREIGN
from subquad_numpy.runtime.native_tasks import call

# Places in the words of a call, int64: the address of the kernel; its tasks; the records, to which addresses are to be
# added: how many, their fields, and where they are; how many fields are given, and the address of their numbers; the
# address of NumPy's class of arrays, or 0, and that of None; then, for each field that is given, an array object, or
# None. Without the class, addresses, or 0.
KERNEL, TASKS, RECORDS, FIELDS, MEMORY, GIVEN, PLACES, ARRAY, NOTHING, HEAD = range(10)
TYPE, NUMBERS_AT = DATA // 8 - 1, DATA // 8  # of an object, in words: its class; of an array: where its numbers are


@cache
def direct() -> Callable[[bytes], int]:
    """Compile the function of the words of a call, which runs all tasks, without the interpreter lock.

    It returns what the kernel does; or `FOREIGN`, with nothing done, if an object is no array of exactly NumPy's class.
    """
    kind, numbers_at = TYPE, NUMBERS_AT

    def run(words: Any) -> int:
        fields, array, nothing = words[FIELDS], words[ARRAY], words[NOTHING]
        size = words[RECORDS] * fields
        memory, places = pointer(words[MEMORY], np.int64(0)), pointer(words[PLACES], np.int64(0))
        records = np.empty(size, np.int64)
        copy(memory, size, pointer(records.ctypes.data, np.int64(0)))
        for i in range(words[GIVEN]):
            word = words[HEAD + i]
            if word == nothing:
                continue
            if array != 0:
                found = pointer(word, np.int64(0))
                if found[kind] != array:
                    return FOREIGN
                word = found[numbers_at]
            for place in range(places[i], size, fields):
                records[place] += word
        return call(words[KERNEL], 0, words[TASKS], records.ctypes.data)

    address = compiled_address(run, "direct", [types.CPointer(types.int64)])
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(address)


def head_of(kernel: Any, tasks: int, records: np.ndarray, places: np.ndarray, *, objects: bool) -> bytes:
    """The words of a call but for its objects, or its addresses; `records` and `places` must outlive them."""
    kinds = (id(np.ndarray), id(None)) if objects else (0, 0)
    of_records = *records.shape, address_of(records), len(places), address_of(places)
    return np.array([kernel.address, tasks, *of_records, *kinds], np.int64).tobytes()
