"""Half precision read in one pass: float16 in float32 and back."""

from __future__ import annotations

from functools import cache
from typing import Any

from subquad_numpy.codegen import pointer, shifted
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.stored import round_row, widen_rows
from subquad_numpy.runtime.arguments import Fields, fields

PART = 1 << 15  # numbers of a task
# how many numbers an item has, and tasks; whether numbers are rounded, or else widened; how those of 16 bits are stored
SIZES: Fields = dict.fromkeys(("size", "tasks", "rounds", "stored"))
RECORD = fields(SIZES, {"x": 0, "out": 0})  # of a whole array


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
