"""What XLA calls for a compiled kernel: a handler that reads a plan and runs the kernel, compiled as kernels are.

A kernel is a function (first, last, records) with argument records of 64-bit numbers and addresses, one record for each
item of a batch. XLA passes buffers, the last of which is a *plan*, 64-bit words that say what the records hold:

    head             tasks of an item, threads, number of fields, number of batch axes, is the call long?
    sizes            the size of each batch axis
    of each field    (what, a, b, c) as below, then a stride in bytes for each batch axis

    (LITERAL, number, 0, 0)     the number
    (OPERAND, k, 0, 0)          the address of operand k
    (RESULT, k, zeros, 0)       the address of result k, which is filled with zeros first if `zeros` is 1
    (SUMMED, k, rows, wide)     the address of scratch for `rows` partial sums of result k (of float64 if `wide`), zeros
                                at first, which are added up into the result after the run

One function for each type of numbers, `serve`, reads plans. XLA calls a kernel by a name, which stands for an *entry*:
a few instructions that call the *handler* with the kernel's address, and it calls `serve`. If a kernel finds no memory
for its scratch, XLA gets an error. A *call frame* is the structure in which XLA passes buffers; offsets into it are
those of `xla/ffi/api/c_api.h` in jaxlib, in words of 64 bits.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir

from subquad_numpy.codegen import inline, intrinsic, pointer, types
from subquad_numpy.codegen.compile import DONE, compiled_address
from subquad_numpy.runtime.arguments import LARGE
from subquad_numpy.runtime.huge_pages import HUGE, inside, madvise
from subquad_numpy.runtime.native_tasks import (
    CALLER,
    CORE,
    FAILED,
    GET_CORE,
    KERNEL,
    RECORDS,
    SELF,
    SHARES,
    SIZE,
    SYSTEM,
    TASKS,
    TEAM,
    scheduler,
    shares_for,
    worker,
)

LITERAL, OPERAND, RESULT, SUMMED = range(4)
HEAD, ROW = 5, 4  # words of a plan before the sizes; words of a field before its strides

# Offsets in words, by structure of XLA.
EXTENSION, API, OPERANDS, RESULTS = 1, 2, 9, 14  # call frame; the number of operands is two words before OPERANDS
CREATE_ERROR = 6  # table of functions (API)
KIND, DATA, RANK, SIZES = 2, 3, 4, 5  # buffer
COMPLEX = (15, 18)  # values of KIND for complex64 and complex128, which hold two real numbers each
METADATA_TYPE, METADATA = 1, 3  # extension: its type if it is metadata (low half of word 1); offset of the metadata
API_VERSION, TRAITS = 3, 4  # metadata; the version is major and minor number in one word
NO_MEMORY = np.frombuffer(b"a compiled kernel found no memory for its scratch\0", np.uint8)
RESOURCE_EXHAUSTED = 8  # XLA's code of the error
LINE = 64  # bytes of a cache line; the partial sums of each result begin on a new line

WORK, CREATE, JOIN, MESSAGE, MADVISE, SERVE, SCHEDULER = range(7)  # places in `_system`


def entry_of(kernel: int, real: str) -> int:
    """The address of the function that XLA calls for the kernel at this address, of numbers of this real dtype.

    It calls the handler with the kernel's address.
    """
    handler, words = _handler(), _system(real).ctypes.data

    def entry(frame: Any) -> int:
        return invoke(handler, frame.ctypes.data, kernel, words, 0)

    return compiled_address(entry, f"entry {kernel}", [types.CPointer(types.int64)], keeps=False)


@cache
def _system(real: str) -> np.ndarray:
    """The addresses that the handler needs, as their places are named; the scheduler's come last."""
    libc = ctypes.CDLL(None)
    create, join = (ctypes.cast(x, ctypes.c_void_p).value for x in (libc.pthread_create, libc.pthread_join))
    return np.array(
        [worker().address, create, join, NO_MEMORY.ctypes.data, madvise(), _server(real), *scheduler()], np.int64
    )


@intrinsic
def invoke(address: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Call the function at an address with up to four integers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * 4)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(*[types.int64] * 5), codegen


@inline
def _count_reals(buffer: Any, zero: int) -> int:
    """The number of real numbers in a buffer."""
    count = 1
    for axis in range(buffer[RANK]):
        count *= pointer(buffer[SIZES], zero)[axis]
    return 2 * count if buffer[KIND] & 0xFFFFFFFF in COMPLEX else count


@inline
def _bytes_of_sums(result: Any, rows: int, wide: int, size: int, zero: int) -> int:
    """The bytes of `rows` partial sums of a result, whose numbers have `size` bytes, rounded up to cache lines."""
    return -(-rows * _count_reals(result, zero) * (8 if wide else size) // LINE) * LINE


_inside, _shares_for = inline(inside), inline(shares_for)


@inline
def ask_by(madvise: int, first: int, size: int) -> None:
    """`huge_pages.ask` in compiled code, by the function at this address."""
    if size >= LARGE and madvise != 0:
        start, whole = _inside(first, size)
        invoke(madvise, start, whole, HUGE, 0)


@inline
def _sum_rows(rows: Any, parts: int, out: Any, count: int) -> None:
    for c in range(count):
        total = 0.0
        for r in range(parts):
            total += rows[r * count + c]
        out[c] = total


@inline
def _run_tasks(kernel: int, tasks: int, threads: int, is_long: bool, records: Any, system: Any) -> int:
    """Run all tasks on new threads and this one; returns how many shares of the tasks failed."""
    threads = min(threads, tasks)
    words = np.zeros(SIZE, np.int64)
    words[KERNEL], words[TASKS], words[RECORDS] = kernel, tasks, records.ctypes.data
    words[SHARES] = _shares_for(tasks, threads) if threads > 1 else 1
    if is_long and threads > 1 and system[SCHEDULER] != 0:  # a thread that begins on the core of this one leaves it
        for i in range(SYSTEM, SIZE):
            words[i] = system[SCHEDULER + i - SYSTEM]
        words[TEAM], words[CALLER] = threads, invoke(words[SELF], 0, 0, 0, 0)
        words[CORE] = invoke(words[GET_CORE], 0, 0, 0, 0) & 0xFFFFFFFF
    ids = np.zeros(max(threads, 1), np.int64)
    failed = np.zeros(max(threads, 1), np.int64)
    # a thread that cannot be started does not matter: the others take all shares
    for t in range(1, threads):
        code = invoke(system[CREATE], ids.ctypes.data + 8 * t, 0, system[WORK], words.ctypes.data)
        failed[t] = code & 0xFFFFFFFF
    invoke(system[WORK], words.ctypes.data, 0, 0, 0)
    for t in range(1, threads):
        if failed[t] == 0:
            invoke(system[JOIN], ids[t], 0, 0, 0)
    return words[FAILED]


@cache
def _server(real: str) -> int:
    """The address of `serve(frame, kernel, system)`, for buffers of a real dtype and of complex numbers of these.

    It runs the kernel as planned, and returns `DONE`; anything else if there was no memory.
    """
    zero, double, number, size = np.int64(0), np.float64(0), np.dtype(real).type(0), np.dtype(real).itemsize

    def serve(frame: Any, kernel: int, system: Any) -> int:
        operands, results = pointer(frame[OPERANDS], zero), pointer(frame[RESULTS], zero)
        plan = pointer(pointer(operands[frame[OPERANDS - 2] - 1], zero)[DATA], zero)
        tasks, threads, fields, axes, is_long = plan[0], plan[1], plan[2], plan[3], plan[4] != 0
        row, start = ROW + axes, HEAD + axes
        items, needed = 1, 0  # batch items, and bytes of partial sums
        for axis in range(axes):
            items *= plan[HEAD + axis]
        for i in range(fields):
            at = start + i * row
            if plan[at] == SUMMED:
                needed += _bytes_of_sums(pointer(results[plan[at + 1]], zero), plan[at + 2], plan[at + 3], size, zero)
        scratch = np.zeros(needed // 8, np.int64)
        first, used = np.zeros(fields, np.int64), 0  # the argument record of the first item
        for i in range(fields):
            at = start + i * row
            what, k, more = plan[at], plan[at + 1], plan[at + 2]
            if what == LITERAL:
                first[i] = k
            elif what == OPERAND:
                first[i] = pointer(operands[k], zero)[DATA]
            elif what == RESULT:
                result = pointer(results[k], zero)
                first[i], count = result[DATA], _count_reals(result, zero)
                ask_by(system[MADVISE], result[DATA], size * count)
                if more:
                    numbers = pointer(result[DATA], number)
                    for j in range(count):
                        numbers[j] = 0
            else:
                first[i] = scratch.ctypes.data + used
                used += _bytes_of_sums(pointer(results[k], zero), more, plan[at + 3], size, zero)

        # the record of any item is the first one, moved by the strides of the batch axes
        records = np.zeros(items * fields, np.int64)
        for item in range(items):
            for i in range(fields):
                records[item * fields + i] = first[i]
            rest = item
            for axis in range(axes - 1, -1, -1):
                place = rest % plan[HEAD + axis]
                rest //= plan[HEAD + axis]
                if place:
                    for i in range(fields):
                        records[item * fields + i] += place * plan[start + i * row + ROW + axis]
        failed = _run_tasks(kernel, items * tasks, threads, is_long, records, system)

        used = 0  # add up the partial sums, in the order in which they were laid out
        for i in range(fields):
            at = start + i * row
            what, k, rows, wide = plan[at], plan[at + 1], plan[at + 2], plan[at + 3]
            if what == SUMMED:
                result = pointer(results[k], zero)
                count = _count_reals(result, zero)
                out = pointer(result[DATA], number)
                if wide:
                    _sum_rows(pointer(scratch.ctypes.data + used, double), rows, out, count)
                else:
                    _sum_rows(pointer(scratch.ctypes.data + used, number), rows, out, count)
                used += _bytes_of_sums(result, rows, wide, size, zero)
        return DONE if failed == 0 else 0

    word = types.int64
    return compiled_address(serve, f"serve {real}", [types.CPointer(word), word, types.CPointer(word)])


@cache
def _handler() -> int:
    """The address of the handler: it runs a kernel for a call frame, and returns 0 or the address of an error."""
    zero = np.int64(0)

    def handler(frame: Any, kernel: int, system: Any) -> int:
        if frame[EXTENSION] != 0:  # XLA asks for the version of the interface, when the name is registered
            extension = pointer(frame[EXTENSION], zero)
            if extension[1] & 0xFFFFFFFF == METADATA_TYPE:
                metadata = pointer(extension[METADATA], zero)
                metadata[API_VERSION] = 3 << 32  # major 0, minor 3
                metadata[TRAITS] = 0
                return 0
        if invoke(system[SERVE], frame.ctypes.data, kernel, system.ctypes.data, 0) == DONE:
            return 0
        error = np.zeros(4, np.int64)  # size, no extension, message, code
        error[0], error[2], error[3] = 28, system[MESSAGE], RESOURCE_EXHAUSTED
        return invoke(pointer(frame[API], zero)[CREATE_ERROR], error.ctypes.data, 0, 0, 0)

    word = types.int64
    return compiled_address(handler, "handler", [types.CPointer(word), word, types.CPointer(word)])
