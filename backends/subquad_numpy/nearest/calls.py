"""The nearest of m centres on NumPy arrays, compiled: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.kernels.nearest import outputs
from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fix_rows, fixed, row_step

Array = np.ndarray[Any, Any]
PART = 1024  # rows whose sums are added up one after the other; a function of shapes alone, as results are


def cut_work(arrays: Sequence[Any], batch: tuple[int, ...]) -> tuple[dict[str, int], int, float]:
    """(numbers of the argument record for contiguous rows, parts of an item, multiply-adds of an item)."""
    x, centres, values, _ = arrays
    (n, d), m, items = x.shape[-2:], centres.shape[-2], math.prod(batch)
    d_v = 0 if values is None else values.shape[-1]
    part = max(PART, 16 * m)  # all sums take at most a 16th of what is summed up
    parts = max(1, -(-n // part))
    sizes = {
        "n": n, "m": m, "d": d, "d_v": d_v, "parts": parts, "part": part, "x_row": d, "v_row": d_v,
        "count_step": items * m, "total_step": items * m * d, "summed_step": items * m * d_v,
    }  # fmt: skip
    return sizes, parts, float(n * m * d)


def _plan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The outputs of the kernel `nearest`."""
    from subquad_numpy.nearest.kernel import NEAREST_RECORD, nearest_kernel

    x, centres, values, mask = arrays
    of_index, of_count, *of_sums = outputs(x, centres, values, key_mask=mask)
    batch, dtype = of_index.shape[:-1], x.dtype
    numbers, parts, products = cut_work(arrays, batch)
    fixes = fix_rows(x), fix_items(centres, 2), None if values is None else fix_rows(values)
    fix_mask = None if mask is None else fix_items(mask, 1)

    def ready(arrays: Sequence[Any]) -> list[Any]:
        return [y if y is None else fixed(fix, y) for fix, y in zip((*fixes, fix_mask), arrays, strict=True)]

    examples = dict(zip(("x", "centres", "values", "mask"), ready(arrays), strict=True))
    values_of = {**numbers, **examples, "x_row": row_step(examples["x"])}
    if values is not None:
        values_of["v_row"] = row_step(examples["values"])
    made = {"index": np.empty(of_index.shape, np.int32), "count": np.empty(of_count.shape, np.int32)}
    made |= {name: np.empty(y.shape, dtype) for name, y in zip(("total", "summed"), of_sums, strict=False)}
    run = Run(nearest_kernel(dtype), NEAREST_RECORD, batch, parts, products, values_of | made)

    def nearest(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, ...], None]:
        index = new(of_index.shape, np.int32)
        whole = [new(of_count.shape, np.int32), *(new(y.shape, dtype) for y in of_sums)]
        cut = whole if parts == 1 else [np.empty((parts, *y.shape), y.dtype) for y in whole]
        run((*ready(arrays), index, *cut, *[None] * (2 - len(of_sums))), threads)
        if parts > 1:
            for y, in_parts in zip(whole, cut, strict=True):
                np.sum(in_parts, axis=0, out=y)
        return (index, *whole), None

    return nearest


nearest = Forms(_plan)


def nearest_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: Any = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients by the rows and the values: those by the sums of their clusters."""
    index = outputs[0]
    found: list[Array | None] = [None] * len(arrays)
    for place, by in zip((0, 2), grads[2:], strict=False):
        if by is not None and need[place]:
            own = np.take_along_axis(by, np.maximum(index, 0)[..., None], axis=-2)
            found[place] = np.where(index[..., None] < 0, 0, own)
    return tuple(found)
