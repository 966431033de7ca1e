"""The order of rows by their buckets: products with the rotations, the largest of each row, and a counting sort.

A bucket is the place of the largest |x R| in a row of products, and its sign.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import absolute, cut, inline, load, pointer, room, shifted, where_negative, zeros
from subquad_numpy.codegen.argmax import least_place_of_largest
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.matmul import TILE_ROWS, Panels, multiply, padded, place_in, rows_at
from subquad_numpy.codegen.stored import stored_as, widen_rows
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.runtime.stored import AS_COMPUTED

ROWS = 64  # rows of a tile

# Rows, numbers of a row, columns of the rotations, rounds, buckets of both parts of the columns (0: no second part),
# rows of a chunk, columns of `chunk`, the stride of x from row to row, and how x is stored.
ORDER_RECORD = fields(
    dict.fromkeys(("n", "d", "columns", "rounds", "first", "second", "size", "kept", "x_row", "stored")),
    {"x": 2, "rotations": 3, "mask": 1, "order": 2, "chunk": 2},
)


@inline
def _bucket(products: Any, width: int, half: int, lanes: int, steps: Any) -> int:
    """The bucket of a row of products, of which those from column `half` on are 0; `steps` has 0, 2, 4, …"""
    x = load(products, 0)
    best, key = absolute(x), load(steps, 0) + where_negative(x, zeros(steps) + 1.0, zeros(steps))
    for j in range(lanes, width, lanes):
        x = load(products, j)
        large = absolute(x)
        own = load(steps, 0) + where_negative(x, zeros(steps) + (2.0 * j + 1.0), zeros(steps) + 2.0 * j)
        behind = best - large
        key = where_negative(behind, own, key)
        best = where_negative(behind, large, best)
    found = int(least_place_of_largest(best, key, zeros(steps) + 2.0 * width))
    return found // 2 + half * (found % 2)


@cache
def order_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the orders; a task is a round of an item."""
    lanes, kind, zero = element(dtype)
    word, byte = np.int32(0), np.uint8(0)

    @compiled(f"hashed order {dtype}", ORDER_RECORD)
    def hash_and_sort(begin: int, last: int, records: Any) -> int:
        f = records[0]
        n, d, columns, half_1, half_2 = f.n, f.d, f.columns, f.first // 2, f.second // 2
        width_1, width_2 = padded(half_1, lanes), padded(half_2, lanes)
        width, count = width_1 + width_2, f.first * max(f.second, 1)
        sizes = (d * width, width, (ROWS + TILE_ROWS) * width, (ROWS + TILE_ROWS) * d, lanes)
        buffer = np.empty(room(sizes), kind)
        directions, nothing, products, own, steps = cut(buffer, sizes)
        found, places = np.empty(n, np.int32), np.empty(count + 2, np.int64)
        x_as = stored_as(f.stored, 0)
        clear(nothing, width)
        for lane in range(lanes):
            steps[lane] = 2 * lane
        for task in range(begin, last):
            f = records[task // f.rounds]
            r = task % f.rounds
            x, mask = pointer(f.x, zero), pointer(f.mask, byte)
            rotation = shifted(pointer(f.rotations, zero), r * d * columns)
            order, chunk = shifted(pointer(f.order, word), r * n), pointer(f.chunk, word)
            for c in range(width):
                column = c if c < width_1 else half_1 + c - width_1
                exists = c < half_1 or (c >= width_1 and c - width_1 < half_2)
                for p in range(d):
                    number = rotation[p * columns + column] if exists else zero
                    directions[place_in(Panels(directions, d), p, c, width, lanes)] = number
            for b in range(count + 2):
                places[b] = 0
            for i in range(0, n, ROWS):
                rows = min(ROWS, n - i)
                left = rows_at(shifted(x, i * f.x_row), f.x_row)
                if i + padded(rows, TILE_ROWS) > n or x_as != AS_COMPUTED:  # a product reads whole tiles of rows
                    widen_rows(x, x_as, i * f.x_row, f.x_row, rows, d, lanes, own, d)
                    clear(shifted(own, rows * d), (padded(rows, TILE_ROWS) - rows) * d)
                    left = rows_at(own, d)
                multiply(
                    left, padded(rows, TILE_ROWS), Panels(directions, d), d, width, lanes, rows_at(nothing, 0),
                    rows_at(products, width),
                )  # fmt: skip
                for t in range(rows):
                    row = shifted(products, t * width)
                    bucket = _bucket(row, width_1, half_1, lanes, steps)
                    if half_2 > 0:
                        bucket = bucket * f.second + _bucket(shifted(row, width_1), width_2, half_2, lanes, steps)
                    if f.mask != 0 and mask[i + t] == 0:
                        bucket = count
                    found[i + t] = bucket
                    places[bucket + 1] += 1
            for b in range(count + 1):
                places[b + 1] += places[b]
            for i in range(n):
                place = places[found[i]]
                places[found[i]] += 1
                order[place] = i
                if r < f.kept:
                    chunk[i * f.kept + r] = place // f.size
        return DONE

    return hash_and_sort
