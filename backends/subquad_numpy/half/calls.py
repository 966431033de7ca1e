"""Conversions of large arrays to half precision and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.needs import why_not_compiled
from subquad_numpy.runtime.arguments import Forms, Run
from subquad_numpy.runtime.stored import KINDS

Array = np.ndarray[Any, Any]

LEAST = 1 << 14  # numbers of an array for which this pays: NumPy converts one after the other, these in 25 µs
MOST_PARTS = 1 << 12  # contiguous parts of an array, each with an argument record
PAIRS = {("float16", "float32"), ("float32", "float16"), ("float32", "bfloat16")}  # bfloat16 is widened as fast without


def converted(x: Array, dtype: Any) -> Array:
    """The numbers of a large array in another dtype, as by `numpy.ndarray.astype`."""
    if (x.dtype.name, np.dtype(dtype).name) not in PAIRS or type(x) is not np.ndarray or declines():
        return x.astype(dtype)
    return _convert((x,), {"dtype": np.dtype(dtype)})[0][0]


@cache
def declines() -> bool:
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


_convert = Forms(_plan_convert)
