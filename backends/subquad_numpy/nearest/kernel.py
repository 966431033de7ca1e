"""The nearest of m centres: products with all centres, the largest of each row, and the row added to its sum.

    argmin_c |x − c|² = argmax_c (x − o)·(c − o) − |c − o|² / 2,    o = mean of the centres

A tile of rows less o is the left factor of a product whose right factor, the centres less o, is packed once a task.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import cut, inline, load, pointer, room, shifted, store, where_negative, zeros
from subquad_numpy.codegen import total as total_of
from subquad_numpy.codegen.argmax import least_place_of_largest
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.matmul import TILE_ROWS, Panels, multiply, padded, place_in, rows_at
from subquad_numpy.runtime.arguments import fields

ROWS = 64  # rows of a tile

# Rows, centres, numbers of a row and of a value; parts of an item, and the rows of a part; strides from row to row.
# Sums come in parts, with steps from one part to the next.
NEAREST_RECORD = fields(
    dict.fromkeys(("n", "m", "d", "d_v", "parts", "part", "x_row", "v_row", "count_step", "total_step", "summed_step")),
    {"x": 2, "centres": 2, "values": 2, "mask": 1, "index": 1, "count": 1, "total": 2, "summed": 2},
)


@inline
def _less(x: Any, origin: Any, d: int, lanes: int, rest: Any) -> Any:
    """Write x − origin into `rest`; returns 0 if all numbers of x are finite, else NaN."""
    whole, odd = zeros(x), x[0] * 0
    for p in range(0, d // lanes * lanes, lanes):
        numbers = load(x, p)
        whole = whole + numbers * 0.0
        store(rest, p, numbers - load(origin, p))
    for p in range(d // lanes * lanes, d):
        odd += x[p] * 0
        rest[p] = x[p] - origin[p]
    return total_of(whole) + odd


@inline
def _add(x: Any, d: int, lanes: int, sums: Any) -> None:
    """Add the row x to the sums."""
    for p in range(0, d // lanes * lanes, lanes):
        store(sums, p, load(sums, p) + load(x, p))
    for p in range(d // lanes * lanes, d):
        sums[p] += x[p]


@cache
def nearest_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the nearest centres; a task is a part of the rows of an item."""
    lanes, kind, zero = element(dtype)
    word, byte, infinity = np.int32(0), np.uint8(0), dtype.type(np.inf)

    @compiled(f"nearest {dtype}", NEAREST_RECORD)
    def nearest(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, m, d, d_v = f.n, f.m, f.d, f.d_v
        width = padded(m, lanes)
        sizes = (d, d * width, width, (ROWS + TILE_ROWS) * d, (ROWS + TILE_ROWS) * width, lanes, ROWS)
        buffer = np.empty(room(sizes), kind)
        origin, directions, start, rest, scores, steps, seen = cut(buffer, sizes)
        clear(rest, (ROWS + TILE_ROWS) * d)
        for lane in range(lanes):
            steps[lane] = lane
        for task in range(first, last):
            f = records[task // f.parts]
            part = task % f.parts
            x, centres, values = pointer(f.x, zero), pointer(f.centres, zero), pointer(f.values, zero)
            mask, index = pointer(f.mask, byte), pointer(f.index, word)
            count = shifted(pointer(f.count, word), part * f.count_step)
            total = shifted(pointer(f.total, zero), part * f.total_step)
            summed = shifted(pointer(f.summed, zero), part * f.summed_step)
            clear(count, m)
            clear(total, m * d)
            if f.values != 0:
                clear(summed, m * d_v)
            clear(origin, d)
            for c in range(m):
                for p in range(d):
                    origin[p] += centres[c * d + p] / m
            for c in range(width):
                half = zero
                for p in range(d):
                    number = centres[c * d + p] - origin[p] if c < m else zero
                    half += number * number
                    directions[place_in(Panels(directions, d), p, c, width, lanes)] = number
                start[c] = half / -2 if c < m else -infinity
            end = min((part + 1) * f.part, n)
            for i in range(part * f.part, end, ROWS):
                rows = min(ROWS, end - i)
                for t in range(rows):
                    seen[t] = 0
                    if f.mask == 0 or mask[i + t] != 0:
                        row = shifted(x, (i + t) * f.x_row)
                        seen[t] = 1 if _less(row, origin, d, lanes, shifted(rest, t * d)) == 0 else 0
                multiply(
                    rows_at(rest, d), padded(rows, TILE_ROWS), Panels(directions, d), d, width, lanes,
                    rows_at(start, 0), rows_at(scores, width),
                )  # fmt: skip
                for t in range(rows):
                    own = -1
                    if seen[t] != 0:
                        best, place = load(scores, t * width), load(steps, 0)
                        for j in range(lanes, width, lanes):
                            score = load(scores, t * width + j)
                            behind = best - score
                            place = where_negative(behind, load(steps, 0) + float(j), place)
                            best = where_negative(behind, score, best)
                        own = int(least_place_of_largest(best, place, zeros(steps) + float(width)))
                        count[own] += 1
                        _add(shifted(x, (i + t) * f.x_row), d, lanes, shifted(total, own * d))
                        if f.values != 0:
                            _add(shifted(values, (i + t) * f.v_row), d_v, lanes, shifted(summed, own * d_v))
                    index[i + t] = own
        return DONE

    return nearest
