"""Compiled NumPy kernels as XLA FFI targets, without a compiler: what XLA calls is compiled by Numba.

A kernel is a function (first, last, records) with argument records of 64-bit numbers and addresses, one record for each
item of a batch. XLA passes buffers. The last operand is a *plan*, 64-bit words that say what the records hold:

    head             tasks of an item, threads, number of fields, number of batch axes
    sizes            the size of each batch axis
    of each field    (what, a, b, c) as below, then a stride in bytes for each batch axis

    (LITERAL, number, 0, 0)     the number
    (OPERAND, k, 0, 0)          the address of operand k
    (RESULT, k, zeros, 0)       the address of result k, which is filled with zeros first if `zeros` is 1
    (SUMMED, k, rows, wide)     the address of scratch for `rows` partial sums of result k (of float64 if `wide`), zeros
                                at first, which are added up into the result after the run

One *handler* for each type of numbers reads plans. XLA calls a kernel by a name, which stands for an *entry*: a few
instructions that call the handler with the kernel's address. If a kernel finds no memory for its scratch, XLA gets an
error. A *call frame* is the structure in which XLA passes buffers; offsets into it are those of
`xla/ffi/api/c_api.h` in jaxlib, in words of 64 bits.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numba
import numpy as np
from jax import Array, ShapeDtypeStruct
from llvmlite import ir
from numba import carray, cfunc, types

from subquad.backend import Like
from subquad_jax import shard_types
from subquad_numpy.codegen import inline, intrinsic, pointer
from subquad_numpy.codegen.compile import DONE, compiled, fingerprint, native
from subquad_numpy.runtime import native_tasks
from subquad_numpy.runtime.huge_pages import ask_by, madvise
from subquad_numpy.runtime.launch import Launch, Rows
from subquad_numpy.runtime.native_tasks import FAILED, KERNEL, RECORDS, SHARES, SHARES_OF_THREAD, SIZE, TASKS, worker

LITERAL, OPERAND, RESULT, SUMMED = range(4)
HEAD, ROW = 4, 4  # words of a plan before the sizes; words of a field before its strides

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

WORK, CREATE, JOIN, MESSAGE, MADVISE = range(5)  # places in `_system`


def call(launch: Launch, operands: Mapping[str, Array | None]) -> dict[str, Array]:
    """The results of a launch by name. A field that is neither operand, result nor size is 0, as is an operand of None.

    Under vmap the items of the new batch axis are run one after the other.
    """
    given = {name: x for name, x in operands.items() if x is not None}
    results = [ShapeDtypeStruct(x.shape, x.dtype) for x in launch.results.values()]
    places, outputs = list(given), list(launch.results)
    reused = {places.index(y): outputs.index(x) for x, y in launch.reused.items() if y in given}
    run = jax.ffi.ffi_call(register(launch), results, vmap_method="sequential", input_output_aliases=reused)
    # 64-bit words as pairs of 32 bits, since JAX may have no others
    made = run(*given.values(), plan_of(launch, given).view(np.int32))
    return dict(zip(launch.results, shard_types.vary(made, shard_types.axes_of(given)), strict=True))


def plan_of(launch: Launch, operands: Mapping[str, Any]) -> np.ndarray:
    """The plan of a launch with operands of these shapes."""
    batch, places, outputs = launch.batch, list(operands), list(launch.results)
    words = [launch.tasks, launch.threads, len(launch.record), len(batch), *batch]
    for name, axes in launch.record.items():
        steps = [0] * len(batch)
        if name in operands:
            words += [OPERAND, places.index(name), 0, 0]
            steps = _steps(operands[name], axes, batch)
        elif name in launch.summed:
            words += [SUMMED, outputs.index(name), *map(int, launch.summed[name])]
        elif name in launch.results:
            words += [RESULT, outputs.index(name), int(name in launch.zeros), 0]
            steps = _steps(launch.results[name], axes, batch)
        else:
            words += [LITERAL, launch.sizes.get(name, 0), 0, 0]
        words += steps
    return np.array(words, np.int64)


def _steps(x: Any, axes: int | None, batch: tuple[int, ...]) -> list[int]:
    """The stride in bytes of a contiguous array along each batch axis; its last `axes` axes belong to one item."""
    if axes is None:
        return [0] * len(batch)
    steps, step = [], np.dtype(x.dtype).itemsize
    for size in reversed(x.shape):
        steps.append(0 if size == 1 else step)
        step *= size
    steps = (steps[axes:] + [0] * len(batch))[: len(batch)]
    return steps[::-1]


_lock = threading.Lock()
_alive: list[Any] = []  # keeps compiled code in memory, since XLA holds addresses only


def register(launch: Launch) -> str:
    """Compile the kernel of a launch and register it with XLA, once; returns the name to call it by."""
    with _lock:  # XLA refuses a name that is registered already
        return _register(launch.compile, *launch.kind)


@cache
def _register(compile: Any, *kind: Any) -> str:  # noqa: A002
    place = f"{compile.__module__}.{compile.__name__}"  # kernels of two modules may have one name
    name = "_".join((re.sub(r"\W+", "_", place), *map(str, kind)))
    kernel = compile(*kind)
    entry = _entry(_handler(np.dtype(kind[0]).type(0).real.dtype.name).address, kernel.address)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    jax.ffi.register_ffi_target(name, new_capsule(entry.address, None, None), platform="cpu", api_version=1)
    _alive.extend((kernel, entry))
    return name


@cache
def _system() -> np.ndarray:
    """The addresses that a handler needs: `work`, pthread_create, pthread_join, the text of an error, and madvise."""
    libc = ctypes.CDLL(None)
    create, join = (ctypes.cast(x, ctypes.c_void_p).value for x in (libc.pthread_create, libc.pthread_join))
    return np.array([worker().address, create, join, NO_MEMORY.ctypes.data, madvise()], np.int64)


@intrinsic
def invoke(typingctx: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Call the function at an address with up to four integers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word] * 4)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(*[types.int64] * 5), codegen


def _entry(handler: int, kernel: int) -> Any:
    """The function that XLA calls for this kernel: it calls the handler with the kernel's address."""
    system = _system().ctypes.data

    @cfunc(types.int64(types.int64))
    def entry(frame: int) -> int:
        return invoke(handler, frame, kernel, system, 0)

    return entry


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


@inline
def _sum_rows(rows: Any, out: Any) -> None:
    for c in range(len(out)):
        total = 0.0
        for r in range(len(rows) // max(len(out), 1)):
            total += rows[r * len(out) + c]
        out[c] = total


@inline
def _run_tasks(kernel: int, tasks: int, threads: int, records: Any, system: Any) -> int:
    """Run all tasks on new threads and this one; returns how many shares of the tasks failed."""
    threads = min(threads, tasks)
    words = np.zeros(SIZE, np.int64)
    words[KERNEL], words[TASKS], words[RECORDS] = kernel, tasks, records.ctypes.data
    words[SHARES] = min(tasks, SHARES_OF_THREAD * threads) if threads > 1 else 1
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


@numba.njit(error_model="numpy")  # not inlined: what it raises is caught where it is called
def _serve(frame: Any, kernel: int, system: Any, zero: int, number: Any, double: float, size: int) -> int:
    """Run the kernel as planned; returns how many shares of the tasks failed. Buffers hold numbers like `number`."""
    operands, results = pointer(frame[OPERANDS], zero), pointer(frame[RESULTS], zero)
    plan = pointer(pointer(operands[frame[OPERANDS - 2] - 1], zero)[DATA], zero)
    tasks, threads, fields, axes = plan[0], plan[1], plan[2], plan[3]
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
                carray(pointer(result[DATA], number), count)[:] = 0
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
    failed = _run_tasks(kernel, items * tasks, threads, records, system)

    used = 0  # add up the partial sums, in the order in which they were laid out
    for i in range(fields):
        at = start + i * row
        what, k, rows, wide = plan[at], plan[at + 1], plan[at + 2], plan[at + 3]
        if what == SUMMED:
            result = pointer(results[k], zero)
            count = _count_reals(result, zero)
            out = carray(pointer(result[DATA], number), count)
            if wide:
                _sum_rows(carray(pointer(scratch.ctypes.data + used, double), rows * count), out)
            else:
                _sum_rows(carray(pointer(scratch.ctypes.data + used, number), rows * count), out)
            used += _bytes_of_sums(result, rows, wide, size, zero)
    first[:] = scratch.size  # uses of scratch and records: Numba would free an array after its last use
    records[:fields] = 0
    return failed


@cache
def _handler(real: str) -> Any:
    """Compile the handler for buffers of a real dtype, and of complex numbers made of two such numbers."""
    zero, double, number, size = np.int64(0), np.float64(0), np.dtype(real).type(0), np.dtype(real).itemsize

    def handler(frame: Any, kernel: int, system: Any) -> int:
        """The handler: runs a kernel for a call frame; returns 0, or the address of an error."""
        if frame[EXTENSION] != 0:  # XLA asks for the version of the interface, when the name is registered
            extension = pointer(frame[EXTENSION], zero)
            if extension[1] & 0xFFFFFFFF == METADATA_TYPE:
                metadata = pointer(extension[METADATA], zero)
                metadata[API_VERSION] = 3 << 32  # major 0, minor 3
                metadata[TRAITS] = 0
                return 0
        try:
            failed = _serve(frame, kernel, system, zero, number, double, size)
        except Exception:  # no memory for partial sums or records
            failed = 1
        if failed == 0:
            return 0
        error = np.zeros(4, np.int64)  # size, no extension, message, code
        error[0], error[2], error[3] = 28, system[MESSAGE], RESOURCE_EXHAUSTED
        made = invoke(pointer(frame[API], zero)[CREATE_ERROR], error.ctypes.data, 0, 0, 0)
        error[0] = 0  # a use of the array: Numba would free it after its last use
        return made

    # the file on disk is found by this name, which changes with the sources that are inlined
    handler.__qualname__ = f"handler_{real}_{fingerprint(Path(native_tasks.__file__).parent)}"
    word = types.int64
    return native(word(types.CPointer(word), word, types.CPointer(word)))(handler)


def round_trip_is_right() -> bool:
    """Whether a small kernel that XLA calls reads and writes the right operands, numbers and results of two items."""
    made = Launch(
        _probe_kernel,
        ("float32",),
        {"factor": None, "x": 1, "y": 1, "total": None},
        {"y": Like((2, 3), np.dtype("float32")), "total": Like((3,), np.dtype("float32"))},
        {"factor": 2},
        (2,),
        zeros=frozenset({"y"}),
        summed={"total": Rows(2, wide=True)},
    )
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = call(made, {"x": jax.numpy.asarray(x)})
    return np.array_equal(found["y"], 2 * x) and np.array_equal(found["total"], 6 * x.sum(axis=0))


@cache
def _probe_kernel(dtype: str) -> Any:
    """Compile the kernel of the self-check: y is x times `factor`; two partial sums hold y and 2 y, over all items."""
    number, double, fields = np.dtype(dtype).type(0), np.float64(0), ("factor", "x", "y", "total")

    @compiled(f"probe {dtype}", fields)
    def probe(first: int, last: int, records: Any) -> int:
        for item in range(first, last):
            f = carray(records, last)[item]
            x, y, total = pointer(f.x, number), pointer(f.y, number), pointer(f.total, double)
            for i in range(3):
                y[i] += f.factor * x[i]
                total[i] += f.factor * x[i]
                total[3 + i] += 2 * f.factor * x[i]
        return DONE

    return probe
