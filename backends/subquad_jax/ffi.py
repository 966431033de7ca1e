"""Compiled NumPy kernels as XLA FFI targets, without a compiler of C: what XLA calls is compiled as they are.

XLA calls a kernel by a name and passes buffers; the last operand is the *plan* of the call, which `handler` follows.
"""

from __future__ import annotations

import ctypes
import math
import re
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
from jax import Array, ShapeDtypeStruct

from subquad.backend import Like
from subquad_jax import shard_types
from subquad_jax.handler import LITERAL, OPERAND, RESULT, SUMMED, entry_of
from subquad_numpy.codegen import pointer
from subquad_numpy.codegen.compile import DONE, compiled
from subquad_numpy.runtime.launch import Launch, Rows

# Bytes of arrays from which on a call lasts several milliseconds. A thread that leaves its core for one where other
# threads run waits for its slice of time there, 4 ms, and the call for the thread.
LONG = 1 << 24


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
    arrays = *operands.values(), *launch.results.values()
    is_long = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in arrays) >= LONG
    words = [launch.tasks, launch.threads, len(launch.record), len(batch), int(is_long), *batch]
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
    entry = entry_of(kernel.address, np.dtype(kind[0]).type(0).real.dtype.name)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    jax.ffi.register_ffi_target(name, new_capsule(entry, None, None), platform="cpu", api_version=1)
    _alive.append(kernel)
    return name


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
            f = records[item]
            x, y, total = pointer(f.x, number), pointer(f.y, number), pointer(f.total, double)
            for i in range(3):
                y[i] += f.factor * x[i]
                total[i] += f.factor * x[i]
                total[3 + i] += 2 * f.factor * x[i]
        return DONE

    return probe
