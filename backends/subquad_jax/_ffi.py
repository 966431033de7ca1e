"""Compiled NumPy kernels as XLA FFI targets, without a compiler: the handler itself is compiled by Numba.

A kernel is `kernel(first, last, frame)` with a frame of 64-bit sizes and addresses. XLA hands over buffers; the last
operand is a *plan* that says what each word of the frame is:

    (LITERAL, low, high)        a number
    (OPERAND, k, 0)             the address of operand k
    (RESULT, k, zeros)          the address of result k, which is filled with zeros first if `zeros` is 1
    (SUMMED, k, rows, wide)     scratch of `rows` times the size of result k, zeros, that is added up into it in the end

A kernel that finds no memory for its scratch becomes an error of XLA. Offsets into the call frame are those of
`xla/ffi/api/c_api.h` in jaxlib, in words of 64 bits.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numba
import numpy as np
from numba import carray, cfunc, types

from subquad_jax import _varying
from subquad_numpy.codegen import pointer
from subquad_numpy.runtime import native_tasks as _shares
from subquad_numpy.runtime.native_tasks import FAILED, FRAME, KERNEL, SHARES, SHARES_OF_THREAD, SIZE, TASKS, worker

LITERAL, OPERAND, RESULT, SUMMED = range(4)
HEAD = 2  # rows of the plan before the frame: number of tasks, number of threads

EXTENSION, API, OPERANDS, RESULTS = 1, 2, 9, 14  # of the call frame
CREATE_ERROR = 6  # of the API
DATA = 3  # of a buffer
METADATA_TYPE, METADATA = 1, 3  # of an extension, the type in the low half of its word
API_VERSION, TRAITS = 3, 4  # of the metadata: major and minor in one word
NO_MEMORY = np.frombuffer(b"a compiled kernel found no memory for its scratch\0", np.uint8)
RESOURCE_EXHAUSTED = 8

_libc = ctypes.CDLL(None)
_create, _join = _libc.pthread_create, _libc.pthread_join
_create.argtypes, _create.restype = (ctypes.c_void_p,) * 4, ctypes.c_int
_join.argtypes, _join.restype = (ctypes.c_void_p,) * 2, ctypes.c_int


def call(
    target: str,
    order: Sequence[str],
    operands: dict[str, Any],
    results: dict[str, jax.ShapeDtypeStruct],
    sizes: dict[str, int],
    tasks: int,
    threads: int,
    sums: dict[str, tuple[int, int]] | None = None,
    *,
    writes_all: bool = False,
) -> Any:
    """Call a target whose frame has the fields `order`, each an operand, a result, a sum into one, or a size.

    Operands may be None, which is the address 0. Results are zeros before, unless the kernel `writes_all` of them.
    Batches are run one after the other under vmap.
    """
    given = {name: x for name, x in operands.items() if x is not None}
    places, outputs = list(given), list(results)
    plan = [_literal(tasks), _literal(threads)]
    for name in order:
        if name in given:
            plan.append((OPERAND, places.index(name), 0, 0))
        elif sums and name in sums:
            plan.append((SUMMED, outputs.index(name), *sums[name]))
        elif name in results:
            plan.append((RESULT, outputs.index(name), int(not writes_all), 0))
        else:
            plan.append(_literal(sizes.get(name, 0)))
    run = jax.ffi.ffi_call(target, list(results.values()), vmap_method="sequential")
    made = run(*given.values(), np.array(plan, np.int32).reshape(-1))
    return _varying.vary(made, _varying.axes_of(given))


def _literal(value: int) -> tuple[int, int, int, int]:
    """A plan row for a number."""
    low = np.array(value & 0xFFFFFFFF, np.uint32).view(np.int32)
    return LITERAL, int(low), value >> 32, 0


_lock = threading.Lock()


def register(target: str, make: Callable[..., Any], *kind: Any) -> str:
    """Compile the kernel `make(*kind)` and its handler, and register it; the name to call it by.

    The first of `kind` is a dtype; buffers are handled as its real numbers, two for a complex one.
    """
    with _lock:  # XLA takes a name once
        return _register(target, make, *kind)


@cache
def _register(target: str, make: Callable[..., Any], *kind: Any) -> str:
    name = "_".join(("subquad", target, *map(str, kind)))
    handler = _handler(make(*kind), np.dtype(kind[0]).type(0).real.dtype)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    jax.ffi.register_ffi_target(name, new_capsule(handler.address, None, None), platform="cpu", api_version=1)
    return name


_alive: list[Any] = []  # XLA keeps addresses: the code behind them must not go


def _handler(kernel: Any, real: np.dtype[Any]) -> Any:
    zero = np.int64(0)
    number, double = real.type(0), np.float64(0)

    kernel_address, worker_address, message_address = kernel.address, worker().address, NO_MEMORY.ctypes.data
    work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(worker_address)

    @numba.njit(error_model="numpy")
    def count_reals(buffer: Any) -> int:
        """Real numbers in a buffer: a complex one, of type C64 or C128, holds two each."""
        count = 1
        for axis in range(buffer[4]):
            count *= pointer(buffer[5], zero)[axis]
        kind = buffer[2] & 0xFFFFFFFF
        return 2 * count if kind in (15, 18) else count

    @numba.njit(error_model="numpy")
    def sum_rows(rows: Any, out: Any) -> None:
        for c in range(len(out)):
            total = 0.0
            for r in range(len(rows) // max(len(out), 1)):
                total += rows[r * len(out) + c]
            out[c] = total

    @numba.njit(error_model="numpy")
    def run_tasks(tasks: int, threads: int, frame: Any) -> int:
        """Run all tasks; how many shares of them failed."""
        threads = min(threads, tasks)
        words = np.zeros(SIZE, np.int64)
        words[KERNEL], words[TASKS], words[FRAME] = kernel_address, tasks, frame.ctypes.data
        words[SHARES] = min(tasks, SHARES_OF_THREAD * threads) if threads > 1 else 1
        ids = np.zeros(max(threads, 1), np.int64)
        failed = np.zeros(max(threads, 1), np.int64)
        for t in range(1, threads):
            failed[t] = _create(ids.ctypes.data + 8 * t, 0, worker_address, words.ctypes.data)
        work(words.ctypes.data)
        for t in range(1, threads):
            if failed[t] == 0:
                _join(ids[t], 0)
        return words[FAILED]

    @numba.njit(error_model="numpy")
    def serve(call: Any) -> int:
        """Run the kernel as planned; how many shares of its tasks failed."""
        operands, results = pointer(call[OPERANDS], zero), pointer(call[RESULTS], zero)
        last = pointer(operands[call[OPERANDS - 2] - 1], zero)
        rows = pointer(last[5], zero)[0] // 4
        plan = carray(pointer(last[DATA], np.int32(0)), rows * 4)
        words = np.zeros(rows - HEAD, np.int64)
        scratch_size = 0
        for i in range(HEAD, rows):
            what, k = plan[4 * i], plan[4 * i + 1]
            if what == SUMMED:
                scratch_size += plan[4 * i + 2] * count_reals(pointer(results[k], zero)) + 8
        scratch = np.zeros(scratch_size, np.float64)
        used = 0
        for i in range(HEAD, rows):
            what, k, more = plan[4 * i], plan[4 * i + 1], plan[4 * i + 2]
            if what == LITERAL:
                words[i - HEAD] = (np.int64(more) << 32) | (np.int64(k) & 0xFFFFFFFF)
            elif what == OPERAND:
                words[i - HEAD] = pointer(operands[k], zero)[DATA]
            elif what == RESULT:
                result = pointer(results[k], zero)
                words[i - HEAD] = result[DATA]
                if more:
                    carray(pointer(result[DATA], number), count_reals(result))[:] = 0
            else:
                words[i - HEAD] = scratch.ctypes.data + 8 * used
                used += more * count_reals(pointer(results[k], zero)) + 8
        failed = run_tasks(np.int64(plan[1]), np.int64(plan[5]), words)
        used = 0
        for i in range(HEAD, rows):
            what, k, more, wide = plan[4 * i], plan[4 * i + 1], plan[4 * i + 2], plan[4 * i + 3]
            if what == SUMMED:
                result = pointer(results[k], zero)
                count = count_reals(result)
                out = carray(pointer(result[DATA], number), count)
                address = scratch.ctypes.data + 8 * used
                used += more * count + 8
                if wide:
                    sum_rows(carray(pointer(address, double), more * count), out)
                else:
                    sum_rows(carray(pointer(address, number), more * count), out)
        return failed

    @cfunc(types.int64(types.CPointer(types.int64)), error_model="numpy")
    def handler(call: Any) -> int:
        """0, or the address of an error."""
        if call[EXTENSION] != 0:
            extension = pointer(call[EXTENSION], zero)
            if extension[1] & 0xFFFFFFFF == METADATA_TYPE:
                metadata = pointer(extension[METADATA], zero)
                metadata[API_VERSION] = 3 << 32  # major 0, minor 3
                metadata[TRAITS] = 0
                return 0
        try:
            failed = serve(call)
        except Exception:  # no memory for what is summed up
            failed = 1
        if failed == 0:
            return 0
        error = np.zeros(4, np.int64)  # size, no extension, message, code
        error[0], error[2], error[3] = 28, message_address, RESOURCE_EXHAUSTED
        return _shares.call(pointer(call[API], zero)[CREATE_ERROR], error.ctypes.data, 0, 0)

    _alive.extend((kernel, work, handler))
    return handler
