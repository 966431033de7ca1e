"""Means of m consecutive segments of rows, which may be stored in half precision; some segments are one task."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import inline, pointer, shifted
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.segments import add_means, first_row
from subquad_numpy.runtime.arguments import fields

# segments of an item, and of a task; tasks of an item; rows, numbers of a row and the distance of rows; how numbers are
# stored; whether 0 stands for means that are not finite
MEANS_RECORD = fields(
    dict.fromkeys(("m", "some", "tasks", "n", "d", "row", "stored", "finite")), {"x": 2, "out": 2}
)  # fmt: skip


@inline
def make_finite(x: Any, size: int) -> None:
    """Write 0 over numbers that are not finite."""
    for i in range(size):
        if x[i] - x[i] != 0:
            x[i] = 0


@cache
def means_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the means (m, d) of the segments of rows (n, d)."""
    lanes, kind, zero = element(dtype)

    @compiled(f"means of segments {dtype}", MEANS_RECORD)
    def means(first: int, last: int, records: Any) -> int:
        edge = np.empty(lanes, kind)
        for task in range(first, last):
            f = records[task // records[0].tasks]
            begin = task % f.tasks * f.some
            end = min(begin + f.some, f.m)
            out, size = pointer(f.out, zero), (end - begin) * f.d
            clear(shifted(out, begin * f.d), size)
            low, high = first_row(begin, f.n, f.m), first_row(end, f.n, f.m)
            add_means(pointer(f.x, zero), f.stored, f.row, f.n, f.d, f.m, low, high, out, lanes, edge)
            if f.finite:
                make_finite(shifted(out, begin * f.d), size)
        return DONE

    return means
