"""Half precision read in one pass: float16 in float32 and back, and means of rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import cut, inline, pointer, room, shifted, store, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import store_part
from subquad_numpy.codegen.stored import load_stored, load_stored_part, round_row, widen_rows
from subquad_numpy.runtime.arguments import Fields, fields

PART = 1 << 15  # numbers of a task
ROWS = 32  # whose sum is added to the others at once: sums of many rows stay exact
TOGETHER = 4  # vectors of a row that are added at once
# how many numbers an item has, and tasks; whether numbers are rounded, or else widened; how those of 16 bits are stored
SIZES: Fields = dict.fromkeys(("size", "tasks", "rounds", "stored"))
RECORD = fields(SIZES, {"x": 0, "out": 0})  # of a whole array
# segments of an item, and of a task; rows of a segment; numbers of a row; how they are stored
MEANS_RECORD = fields(dict.fromkeys(("segments", "some", "tasks", "rows", "d", "stored")), {"x": 3, "out": 2})


@cache
def convert_kernel() -> Any:
    """Compile the conversion; a task is a part of an item."""
    lanes, _, zero = element("float32")

    @compiled("half precision", RECORD)
    def convert(first: int, last: int, records: Any) -> int:
        for task in range(first, last):
            f = records[task // records[0].tasks]
            x, out = pointer(f.x, zero), pointer(f.out, zero)
            start = task % f.tasks * PART
            count = min(PART, f.size - start)
            if f.rounds:
                round_row(out, f.stored, start, count, lanes, shifted(x, start))
            else:
                widen_rows(x, f.stored, start, 0, 1, count, lanes, shifted(out, start), 0)
        return DONE

    return convert


@inline
def add_side_by_side(x: Any, stored: int, first: int, rows: int, d: int, lanes: int, factor: Any, out: Any) -> None:
    """The sums of rows times `factor` in four vectors from `first` on: memory is read in its order.

    Each row has its factor before it is added: no sum overflows.
    """
    total = zeros(x), zeros(x), zeros(x), zeros(x)
    for start in range(0, rows, ROWS):
        one, two, three, four = zeros(x), zeros(x), zeros(x), zeros(x)
        for r in range(start, min(start + ROWS, rows)):
            at = first + r * d
            one = one + load_stored(x, stored, at) * factor
            two = two + load_stored(x, stored, at + lanes) * factor
            three = three + load_stored(x, stored, at + 2 * lanes) * factor
            four = four + load_stored(x, stored, at + 3 * lanes) * factor
        total = total[0] + one, total[1] + two, total[2] + three, total[3] + four
    store(out, 0, total[0])
    store(out, lanes, total[1])
    store(out, 2 * lanes, total[2])
    store(out, 3 * lanes, total[3])


@cache
def means_kernel() -> Any:
    """Compile the means of the rows of segments, in float32; a task is some segments of an item."""
    lanes, kind, zero = element("float32")

    @compiled("means of half precision", MEANS_RECORD)
    def means(first: int, last: int, records: Any) -> int:
        buffer = np.empty(room((lanes,)), kind)
        (edge,) = cut(buffer, (lanes,))
        for task in range(first, last):
            f = records[task // records[0].tasks]
            x, out, d, stored = pointer(f.x, zero), pointer(f.out, zero), f.d, f.stored
            begin = task % f.tasks * f.some
            factor = zero + 1 / f.rows
            for s in range(begin, min(begin + f.some, f.segments)):
                first, together = s * f.rows * d, 0
                for c in range(0, d - TOGETHER * lanes + 1, TOGETHER * lanes):
                    together = c + TOGETHER * lanes
                    add_side_by_side(x, stored, first + c, f.rows, d, lanes, factor, shifted(out, s * d + c))
                for c in range(together, d, lanes):
                    total = zeros(edge)
                    for start in range(0, f.rows, ROWS):
                        part = zeros(edge)
                        for r in range(start, min(start + ROWS, f.rows)):
                            part = part + load_stored_part(x, stored, first + r * d + c, d - c, lanes, edge) * factor
                        total = total + part
                    store_part(out, s * d + c, total, d - c, lanes, edge)
        return DONE

    return means
