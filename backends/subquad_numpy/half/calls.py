"""Half precision that is read in one pass: conversions of large arrays, and means of segments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.needs import why_not_compiled
from subquad_numpy.runtime.arguments import Forms, Run, fix_items
from subquad_numpy.runtime.stored import KINDS, stored_word

Array = np.ndarray[Any, Any]

LEAST = 1 << 14  # numbers of an array for which this pays: NumPy converts one after the other, these in 25 µs
MOST_PARTS = 1 << 12  # contiguous parts of an array, each with an argument record
STORED = {"float32", *KINDS}
PAIRS = {("float16", "float32"), ("float32", "float16"), ("float32", "bfloat16")}  # bfloat16 is widened as fast without


def converted(x: Array, dtype: Any) -> Array:
    """The numbers of a large array in another dtype, as by `numpy.ndarray.astype`."""
    if (x.dtype.name, np.dtype(dtype).name) not in PAIRS or type(x) is not np.ndarray or _declines():
        return x.astype(dtype)
    return _convert((x,), {"dtype": np.dtype(dtype)})[0][0]


def means(x: Array, threads: int | None = None) -> Array | None:
    """The means over axis −2 of segments (..., segments, rows, d) in float32; None where the kernel cannot take them.

    They are the same whether numbers are stored as float32 or in half precision. bfloat16 may come as its bits, uint16.
    """
    if type(x) is not np.ndarray or x.dtype.name not in STORED or not x.dtype.isnative or _declines():
        return None
    if fix_items(x, 3) is not None or math.prod(x.shape[:-3]) > MOST_PARTS:
        return None
    return _means((x,), {}, threads=threads)[0][0]


@cache
def _declines() -> bool:
    """Whether there is no compiler here, or no instruction for float16."""
    if why_not_compiled():
        return True
    from subquad_numpy.codegen.halves import WIDENS_HALF

    return not WIDENS_HALF


def _plan_convert(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The conversion of arrays like this one, if they consist of a few contiguous parts."""
    from subquad_numpy.half.kernel import PART, SIZES, convert_kernel

    (x,), dtype, shape = arrays, static["dtype"], arrays[0].shape
    axes, size = 0, 1  # of a part
    for length, stride in zip(reversed(x.shape), reversed(x.strides), strict=True):
        if length != 1 and stride != size * x.itemsize:
            break
        axes, size = axes + 1, size * length
    batch, tasks = shape[: x.ndim - axes], -(-size // PART)
    if math.prod(batch) > MOST_PARTS or not (x.dtype.isnative and x.flags.aligned):
        return lambda arrays, new, threads: ((arrays[0].astype(dtype),), None)
    rounds = dtype.itemsize < x.itemsize
    numbers = {
        "size": size,
        "tasks": tasks,
        "rounds": int(rounds),
        "stored": KINDS[(dtype if rounds else x.dtype).name],
    }
    record = SIZES | {"x": axes, "out": axes}
    run = Run(convert_kernel(), record, batch, tasks, size, numbers | {"x": x, "out": np.empty(shape, dtype)})

    def convert(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array], None]:
        out = new(shape, dtype)
        run((*arrays, out), threads)
        return (out,), None

    return convert


def _plan_means(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The means of segments of an array like this one."""
    from subquad_numpy.half.kernel import MEANS_RECORD, PART, means_kernel

    (x,) = arrays
    segments, rows, d = x.shape[-3:]
    some = max(1, PART // (rows * d))
    tasks, shape = -(-segments // some), (*x.shape[:-2], d)
    numbers = {"segments": segments, "some": some, "tasks": tasks, "rows": rows, "d": d, "stored": stored_word((x,))}
    like = {"x": x, "out": np.empty(shape, np.float32)}
    run = Run(means_kernel(), MEANS_RECORD, x.shape[:-3], tasks, segments * rows * d, numbers | like)

    def means(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array], None]:
        out = new(shape, np.float32)
        run((*arrays, out), threads)
        return (out,), None

    return means


_convert, _means = Forms(_plan_convert), Forms(_plan_means)
