"""Clusters of a fixed number of rows, by splitting sets of rows in halves: the kernel `balanced_tree`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from subquad.kernels.balanced_tree import MEANS_STEPS, POWER_STEPS
from subquad_numpy.codegen import (
    absolute,
    at_least,
    cut,
    inline,
    largest,
    load,
    pointer,
    room,
    spread,
    store,
    total,
    zeros,
)
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.matmul import TILE_ROWS, Panels, multiply, pack, padded, rows_at
from subquad_numpy.runtime.arguments import Fields, fields

# rows, numbers of a row, random directions, rows of a cluster, slots (a power of two times `size`), places of `order`
SIZES: Fields = dict.fromkeys(("n", "d", "directions", "size", "slots", "places"))
TREE_RECORD = fields(SIZES, {"x": 2, "sketch": 2, "mask": 1, "order": 1})
RUN = 8  # numbers that are sorted by insertion before runs are merged


@cache
def balanced_tree_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the order of rows; a task is an item."""
    lanes, kind, zero = element(dtype)
    word, byte = np.int32(0), np.uint8(0)

    @compiled(f"balanced tree {dtype}", TREE_RECORD)
    def tree(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, d, directions, size = f.n, f.d, f.directions, f.size
        wide, columns, rows = padded(d, lanes), padded(directions, lanes), padded(n, TILE_ROWS)
        as_given = d == wide and n == rows  # vectors and tiles read nothing beside the rows
        sizes = (
            0 if as_given else rows * wide,
            rows * columns,
            wide * columns,
            columns,
            n * wide,
            wide,
            wide,
            wide,
            columns,
            n,
            n,
        )
        buffer = np.empty(room(sizes), kind)
        copied, projected, packed, nothing, y, mean, u, v, middle, values, merged = cut(buffer, sizes)
        order, names, other = np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.int32)
        clear(nothing, columns)
        for task in range(first, last):
            f = records[task]
            given, mask, found = pointer(f.x, zero), pointer(f.mask, byte), pointer(f.order, word)
            x = given if as_given else copied
            if not as_given:
                for i in range(n):
                    for p in range(wide):
                        copied[i * wide + p] = given[i * d + p] if p < d else 0
            seen = 0
            for i in range(n):
                if f.mask == 0 or mask[i] != 0:
                    order[seen] = i
                    seen += 1
            hidden = seen
            for i in range(n):
                if f.mask != 0 and mask[i] == 0:
                    order[hidden] = i
                    hidden += 1
            pack(rows_at(pointer(f.sketch, zero), directions), d, directions, 1, lanes, Panels(packed, d))
            multiply(
                rows_at(x, wide), rows, Panels(packed, d), d, columns, lanes, rows_at(nothing, 0),
                rows_at(projected, columns),
            )  # fmt: skip
            width = f.slots
            while width > size:
                half = width // 2
                for begin in range(0, seen, width):
                    many = min(width, seen - begin)
                    split(
                        x, projected, order, begin, many, min(half, many), wide, columns, lanes, y, mean, u, v, middle,
                        values, merged, names, other,
                    )  # fmt: skip
                width = half
            for i in range(f.places):
                found[i] = order[i] if i < n else n - 1
        return DONE

    return tree


@inline
def split(
    x: Any, projected: Any, order: Any, begin: int, many: int, half: int, wide: int, columns: int, lanes: int, y: Any,
    mean: Any, u: Any, v: Any, middle: Any, values: Any, merged: Any, names: Any, other: Any,
) -> None:  # fmt: skip
    """Order the rows order[begin], … by their projections: the lower ones, `half` of them, are one half of the set."""
    share = 1 / many
    sum_rows(x, order, begin, 0, many, wide, lanes, mean)
    sum_rows(projected, order, begin, 0, many, columns, lanes, middle)
    most = zeros(x)
    for i in range(many):
        row = order[begin + i]
        for p in range(0, wide, lanes):
            rest = load(x, row * wide + p) - load(mean, p) * share
            store(y, i * wide + p, rest)
            most = at_least(most, absolute(rest))
    size = largest(most)
    size = size if size > 0 else size * 0 + 1
    best, far = -1.0, 0
    for i in range(many):
        row = order[begin + i]
        for p in range(0, wide, lanes):  # a step of power iteration takes sixth powers, which must not overflow
            store(y, i * wide + p, load(y, i * wide + p) / size)
        along = zeros(x)
        for p in range(0, columns, lanes):
            part = (load(projected, row * columns + p) - load(middle, p) * share) / size
            along = along + part * part
        length = total(along)
        if length > best:
            best, far = length, i
    for p in range(0, wide, lanes):
        store(u, p, load(y, far * wide + p))
    for _ in range(POWER_STEPS):
        for p in range(0, wide, lanes):
            store(v, p, zeros(x))
        for i in range(many):
            values[0] = dot(y, i * wide, u, wide, lanes)
            for p in range(0, wide, lanes):
                store(v, p, load(v, p) + spread(values, 0) * load(y, i * wide + p))
        norm = dot(v, 0, v, wide, lanes) ** 0.5
        factor = 1 / norm if norm > 0 else 1.0
        for p in range(0, wide, lanes):
            store(u, p, load(v, p) * factor)
    for step in range(MEANS_STEPS + 1):
        for i in range(many):
            values[i] = dot(y, i * wide, u, wide, lanes)
            names[i] = i
        sort(values, names, many, merged, other)
        if step < MEANS_STEPS and half < many:
            sum_rows(y, names, 0, 0, half, wide, lanes, u)
            sum_rows(y, names, 0, half, many, wide, lanes, v)
            low, high = 1 / half, 1 / (many - half)
            for p in range(0, wide, lanes):
                store(u, p, load(v, p) * high - load(u, p) * low)
    for i in range(many):
        other[i] = order[begin + names[i]]
    for i in range(many):
        order[begin + i] = other[i]


@inline
def dot(x: Any, start: int, y: Any, width: int, lanes: int) -> Any:
    """x·y, for x from `start` on."""
    along = zeros(x)
    for p in range(0, width, lanes):
        along = along + load(x, start + p) * load(y, p)
    return total(along)


@inline
def sum_rows(x: Any, names: Any, begin: int, first: int, last: int, width: int, lanes: int, sums: Any) -> None:
    """The sum of the rows names[begin + first], …, names[begin + last − 1] of x."""
    for p in range(0, width, lanes):
        along = zeros(x)
        for i in range(first, last):
            along = along + load(x, names[begin + i] * width + p)
        store(sums, p, along)


@inline
def sort(values: Any, names: Any, count: int, merged: Any, other: Any) -> None:
    """Sort values, and the names beside them; equal values keep their order. NaN goes last."""
    for begin in range(0, count, RUN):
        for i in range(begin + 1, min(begin + RUN, count)):
            value, name, at = values[i], names[i], i
            while at > begin and after(values[at - 1], value):
                values[at], names[at] = values[at - 1], names[at - 1]
                at -= 1
            values[at], names[at] = value, name
    width = RUN
    while width < count:
        for begin in range(0, count, 2 * width):
            i, middle, last = begin, min(begin + width, count), min(begin + 2 * width, count)
            j = middle
            for place in range(begin, last):
                if i < middle and (j >= last or not after(values[i], values[j])):
                    merged[place], other[place] = values[i], names[i]
                    i += 1
                else:
                    merged[place], other[place] = values[j], names[j]
                    j += 1
        for i in range(count):
            values[i], names[i] = merged[i], other[i]
        width *= 2


@inline
def after(one: Any, two: Any) -> bool:
    """Whether the first value must come after the second."""
    return one > two or (one != one and two == two)
