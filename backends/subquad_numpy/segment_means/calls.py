"""Means of segments of NumPy arrays in one pass over their memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad_numpy.half.calls import MOST_PARTS, declines
from subquad_numpy.runtime.arguments import Forms, Run, fix_items, row_step, straight
from subquad_numpy.runtime.stored import KINDS, computed, stored_word

Array = np.ndarray[Any, Any]

PART = 1 << 15  # numbers of a task
STORED = {"float32", *KINDS}


def means(x: Array, threads: int | None = None) -> Array | None:
    """The means over axis −2 of segments (..., segments, rows, d) in float32; None where the kernel cannot take them.

    They are the same whether numbers are stored as float32 or in half precision. bfloat16 may come as its bits, uint16.
    """
    if type(x) is not np.ndarray or x.dtype.name not in STORED or not x.dtype.isnative or declines():
        return None
    if fix_items(x, 3) is not None or math.prod(x.shape[:-3]) > MOST_PARTS:
        return None
    m, rows, d = x.shape[-3:]
    return _means((x.reshape(*x.shape[:-3], m * rows, d),), {"m": m}, threads=threads)[0][0]


def means_run(x: Array, m: int, out: Array, *, finite: bool = False) -> Run:
    """The run that writes the means (..., m, d) of segments of rows like x (..., n, d), which are whole, to `out`.

    `finite`: means that are not finite become 0.
    """
    from subquad_numpy.segment_means.kernel import MEANS_RECORD, means_kernel

    numbers = cut_work(x, m, finite=finite)
    values, products = numbers | {"row": row_step(x), "x": x, "out": out}, math.prod(x.shape[-2:])
    kernel = means_kernel(computed(x.dtype))
    return Run(kernel, MEANS_RECORD, x.shape[:-2], numbers["tasks"], products, values, ("x", "out"))


def cut_work(x: Any, m: int, *, finite: bool) -> dict[str, int]:
    """The numbers of the argument record for contiguous rows."""
    n, d = x.shape[-2:]
    some = max(1, PART * m // max(1, n * d))
    return {
        "m": m, "some": some, "tasks": -(-m // some), "n": n, "d": d, "row": d, "stored": stored_word((x,)),
        "finite": int(finite),
    }  # fmt: skip


def _plan_means(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The means of segments of an array like this one."""
    (x,), m = arrays, static["m"]
    shape, dtype = (*x.shape[:-2], m, x.shape[-1]), computed(x.dtype)
    run = means_run(x, m, np.empty(shape, dtype))

    def means(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array], None]:
        out = new(shape, dtype)
        run((*arrays, out), threads)
        return (out,), None

    return straight(means)


_means = Forms(_plan_means)
