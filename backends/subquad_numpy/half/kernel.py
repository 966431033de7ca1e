"""Half precision read in one pass: float16 in float32 and back, and means of rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import cut, pointer, room, shifted, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import store_part
from subquad_numpy.codegen.stored import load_stored_part, round_row, widen_rows
from subquad_numpy.runtime.arguments import Fields, fields
from subquad_numpy.runtime.stored import FLOAT16

PART = 1 << 15  # numbers of a task
ROWS = 32  # whose sum is added to the others at once: sums of many rows stay exact
# how many numbers an item has, and tasks; whether numbers are rounded, or else widened
SIZES: Fields = dict.fromkeys(("size", "tasks", "rounds"))
RECORD = fields(SIZES, {"x": 0, "out": 0})  # of a whole array
# segments of an item, and of a task; rows of a segment; numbers of a row; how they are stored
MEANS_RECORD = fields(dict.fromkeys(("segments", "some", "tasks", "rows", "d", "stored")), {"x": 3, "out": 2})


@cache
def convert_kernel() -> Any:
    """Compile the conversion; a task is a part of an item."""
    lanes, _, zero = element("float32")
    half = FLOAT16

    @compiled("float16", RECORD)
    def convert(first: int, last: int, records: Any) -> int:
        for task in range(first, last):
            f = records[task // records[0].tasks]
            x, out = pointer(f.x, zero), pointer(f.out, zero)
            start = task % f.tasks * PART
            count = min(PART, f.size - start)
            if f.rounds:
                round_row(out, half, start, count, lanes, shifted(x, start))
            else:
                widen_rows(x, half, start, 0, 1, count, lanes, shifted(out, start), 0)
        return DONE

    return convert


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
                for c in range(0, d, lanes):
                    total = zeros(edge)
                    for start in range(0, f.rows, ROWS):
                        part = zeros(edge)
                        for r in range(start, min(start + ROWS, f.rows)):
                            part = part + load_stored_part(x, stored, (s * f.rows + r) * d + c, d - c, lanes, edge)
                        total = total + part
                    store_part(out, s * d + c, total * factor, d - c, lanes, edge)
        return DONE

    return means
