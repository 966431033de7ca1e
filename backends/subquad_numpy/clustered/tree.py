"""Clusters of a fixed number of rows, by splitting sets of rows in halves: the kernel `balanced_tree`."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from subquad.kernels.balanced_tree import MEANS_STEPS, POWER_STEPS
from subquad_numpy.block_attention.tiles import INFINITY
from subquad_numpy.clustered.sort import sort
from subquad_numpy.codegen import (
    absolute,
    at_least,
    at_most,
    cut,
    inline,
    largest,
    load,
    pointer,
    room,
    shifted,
    spread,
    store,
    total,
    where_negative,
    zeros,
)
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.matmul import Panels, multiply, pack, padded, rows_at
from subquad_numpy.codegen.vector_math import SMALLEST
from subquad_numpy.runtime.arguments import Fields, fields

# Rows, numbers of a row, random directions, rows of a cluster, slots (a power of two times `size`), places of `order`,
# sets that a set of rows was split into before, of which each is a task; their rows are `before`, one set after the
# other.
SIZES: Fields = dict.fromkeys(("n", "d", "directions", "size", "slots", "places", "sets"))
TREE_RECORD = fields(SIZES, {"x": 2, "sketch": 2, "mask": 1, "before": 1, "order": 1})
BISECTIONS = 40
PROJECTED = 64  # rows that are projected at once, a multiple of the rows of a tile of products
AT_ONCE = 4  # rows that are multiplied, or summed, side by side


@cache
def balanced_tree_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the order of rows; a task is an item, or one of its `sets`, which all slots then hold a row for."""
    lanes, kind, zero = element(dtype)
    word, byte = np.int32(0), np.uint8(0)

    @compiled(f"balanced tree {dtype}", TREE_RECORD)
    def tree(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, d, directions, size = f.n // f.sets, f.d, f.directions, f.size
        wide, columns = padded(d, lanes), padded(directions, lanes)
        as_given = d == wide  # vectors read nothing beside the rows
        sizes = (
            *(0 if as_given else n * wide, PROJECTED * wide, padded(n, PROJECTED) * columns, wide * columns, columns),
            *(n * wide, wide, wide, wide, columns, padded(n, lanes), max(n, AT_ONCE), 2 * lanes),
        )
        buffer = np.empty(room(sizes), kind)
        copied, tile, projected, packed, nothing, y, mean, u, v, middle, values, merged, here = cut(buffer, sizes)
        order, rows = np.empty(n, np.int32), np.empty(n, np.int32)
        names, other = np.empty(n, np.int32), np.empty(n, np.int32)
        clear(nothing, columns)
        for i in range(lanes):
            here[i] = i
        for task in range(first, last):
            f = records[task // f.sets]
            begin = task % f.sets * n
            given, mask, found = pointer(f.x, zero), pointer(f.mask, byte), pointer(f.order, word)
            before = pointer(f.before, word)
            seen = visible = 0
            for hidden in range(2):
                for i in range(n):
                    row = before[begin + i] if f.before != 0 else i
                    if (1 if f.mask != 0 and mask[row] == 0 else 0) == hidden:
                        rows[seen], order[seen] = row, seen
                        seen += 1
                if hidden == 0:
                    visible = seen
            x = given if as_given else copied
            pack(rows_at(pointer(f.sketch, zero), directions), d, directions, 1, lanes, Panels(packed, d))
            for base in range(0, n, PROJECTED):
                for i in range(base, min(base + PROJECTED, n)):
                    for p in range(wide):
                        value = given[rows[i] * d + p] if p < d else 0
                        tile[(i - base) * wide + p] = value
                        if not as_given:
                            copied[rows[i] * wide + p] = value
                multiply(
                    rows_at(tile, wide), PROJECTED, Panels(packed, d), d, columns, lanes, rows_at(nothing, 0),
                    rows_at(shifted(projected, base * columns), columns),
                )  # fmt: skip
            width = f.slots // f.sets
            while width > size:
                half = width // 2
                for i in range(0, visible, width):
                    many = min(width, visible - i)
                    split(
                        x, projected, rows, order, i, many, min(half, many), wide, columns, lanes, y, mean, u, v,
                        middle, values, merged, names, other, here,
                    )  # fmt: skip
                width = half
            for i in range(n if f.sets > 1 else f.places):
                found[begin + i] = rows[i] if i < n else n - 1
        return DONE

    return tree


@inline
def split(
    x: Any, projected: Any, rows: Any, order: Any, begin: int, many: int, half: int, wide: int, columns: int,
    lanes: int, y: Any, mean: Any, u: Any, v: Any, middle: Any, values: Any, merged: Any, names: Any, other: Any,
    here: Any,
) -> None:  # fmt: skip
    """Order the rows of x rows[begin], … by their projections: the lower ones, `half` of them, are half of the set.

    `order` has the numbers of these rows in `projected`, and keeps step with them.
    """
    share = 1 / many
    sum_rows(x, rows, begin, 0, many, wide, lanes, mean)
    sum_rows(projected, order, begin, 0, many, columns, lanes, middle)
    most = zeros(x)
    for i in range(many):
        row = rows[begin + i]
        for p in range(0, wide, lanes):
            rest = load(x, row * wide + p) - load(mean, p) * share
            store(y, i * wide + p, rest)
            most = at_least(most, absolute(rest))
    # a step of power iteration takes sixth powers, which must not overflow
    factor = (zeros(x) + 1.0) / at_least(zeros(x) + largest(most), SMALLEST(zeros(x)))
    best, far = -1.0, 0
    for i in range(many):
        row = order[begin + i]
        for p in range(0, wide, lanes):
            store(y, i * wide + p, load(y, i * wide + p) * factor)
        along = zeros(x)
        for p in range(0, columns, lanes):
            part = (load(projected, row * columns + p) - load(middle, p) * share) * factor
            along = along + part * part
        length = total(along)
        if length > best:
            best, far = length, i
    for p in range(0, wide, lanes):
        store(u, p, load(y, far * wide + p))
    for _ in range(POWER_STEPS):
        for p in range(0, wide, lanes):
            store(v, p, zeros(x))
        for i in range(0, many, AT_ONCE):
            here_are = min(AT_ONCE, many - i)
            project(y, i, here_are, u, wide, lanes, values, 0)
            add_weighted(values, y, i, here_are, wide, lanes, v)
        norm = dot(v, 0, v, wide, lanes) ** 0.5
        own = 1 / norm if norm > 0 else 1.0
        for p in range(0, wide, lanes):
            store(u, p, load(v, p) * own)
    for step in range(MEANS_STEPS + 1):
        for i in range(0, many, AT_ONCE):
            project(y, i, min(AT_ONCE, many - i), u, wide, lanes, values, i)
        bound = bound_of(values, many, half, lanes, merged) if half < many else values[0] * math.nan
        if step < MEANS_STEPS and half < many:
            if bound == bound:
                for p in range(0, wide, lanes):
                    store(v, p, zeros(x))
                for i in range(0, many, AT_ONCE):
                    for j in range(i, min(i + AT_ONCE, many)):
                        merged[j - i] = 1 if values[j] < bound else 0
                    add_weighted(merged, y, i, min(AT_ONCE, many - i), wide, lanes, v)
            else:
                sort(values, names, many, merged, other, here, lanes)
                sum_rows(y, names, 0, 0, half, wide, lanes, v)
            for p in range(0, wide, lanes):  # the mean of all is 0: that of the upper half lies opposite
                store(u, p, load(v, p) * -1.0)
        elif step == MEANS_STEPS and half < many:
            for i in range(many):
                other[i] = 1 if values[i] < bound else 0
            if bound != bound:
                sort(values, names, many, merged, other, here, lanes)
                for i in range(many):
                    other[names[i]] = 1 if i < half else 0
    if half < many:
        put_low_first(rows, begin, many, half, other, names)
        put_low_first(order, begin, many, half, other, names)


@inline
def put_low_first(numbers: Any, begin: int, many: int, half: int, is_low: Any, copied: Any) -> None:
    """Put the `half` of the numbers from `begin` on that are low first; both parts keep their order."""
    low, high = begin, begin + half
    for i in range(many):
        copied[i] = numbers[begin + i]
    for i in range(many):
        if is_low[i] != 0:
            numbers[low] = copied[i]
            low += 1
        else:
            numbers[high] = copied[i]
            high += 1


@inline
def dot(x: Any, start: int, y: Any, width: int, lanes: int) -> Any:
    """x·y, for x from `start` on."""
    along = zeros(x)
    for p in range(0, width, lanes):
        along = along + load(x, start + p) * load(y, p)
    return total(along)


@inline
def project(x: Any, first: int, count: int, u: Any, width: int, lanes: int, found: Any, at: int) -> None:
    """The products with u of `count` rows of x, at most `AT_ONCE`, from `first` on, into found[at], …."""
    if count < AT_ONCE:
        for i in range(count):
            found[at + i] = dot(x, (first + i) * width, u, width, lanes)
    else:
        one, two, three, four = zeros(x), zeros(x), zeros(x), zeros(x)
        for p in range(0, width, lanes):
            own, place = load(u, p), first * width + p
            one = one + load(x, place) * own
            two = two + load(x, place + width) * own
            three = three + load(x, place + 2 * width) * own
            four = four + load(x, place + 3 * width) * own
        found[at], found[at + 1], found[at + 2], found[at + 3] = total(one), total(two), total(three), total(four)


@inline
def add_weighted(weights: Any, x: Any, first: int, count: int, width: int, lanes: int, sums: Any) -> None:
    """Add `count` rows of x, at most `AT_ONCE`, from `first` on, times weights[0], …, to a row of sums."""
    for p in range(0, width, lanes):
        place, along = first * width + p, load(sums, p)
        if count < AT_ONCE:
            for i in range(count):
                along = along + spread(weights, i) * load(x, place + i * width)
        else:
            some = spread(weights, 0) * load(x, place) + spread(weights, 1) * load(x, place + width)
            more = spread(weights, 2) * load(x, place + 2 * width) + spread(weights, 3) * load(x, place + 3 * width)
            along = along + (some + more)
        store(sums, p, along)


@inline
def sum_rows(x: Any, names: Any, begin: int, first: int, last: int, width: int, lanes: int, sums: Any) -> None:
    """The sum of the rows names[begin + first], …, names[begin + last − 1] of x."""
    whole = first + (last - first) // AT_ONCE * AT_ONCE
    for p in range(0, width, lanes):
        one, two, three, four = zeros(x), zeros(x), zeros(x), zeros(x)
        for i in range(begin + first, begin + whole, AT_ONCE):
            one = one + load(x, names[i] * width + p)
            two = two + load(x, names[i + 1] * width + p)
            three = three + load(x, names[i + 2] * width + p)
            four = four + load(x, names[i + 3] * width + p)
        for i in range(begin + whole, begin + last):
            one = one + load(x, names[i] * width + p)
        store(sums, p, (one + two) + (three + four))


@inline
def bound_of(values: Any, count: int, half: int, lanes: int, rounded: Any) -> Any:
    """A number that exactly `half` of the values are below; NaN if bisection finds none, as among equal values.

    It is a number of the dtype of the values, as memory for one, `rounded`, makes it: to compare with it is exact.
    """
    one, none, low, high = zeros(values) + 1.0, zeros(values), zeros(values) + INFINITY, zeros(values) - INFINITY
    whole = padded(count, lanes)
    for i in range(count, whole):
        values[i] = values[0]
    for i in range(0, count, lanes):
        low, high = at_most(low, load(values, i)), at_least(high, load(values, i))
    for i in range(count, whole):
        values[i] = INFINITY
    least, most, found = -largest(low * -1.0), largest(high), values[0] * math.nan
    for _ in range(BISECTIONS):
        rounded[0] = (least + most) / 2
        bound, below = rounded[0], none
        for i in range(0, count, lanes):
            below = below + where_negative(load(values, i) - bound, one, none)
        many = int(total(below))
        if many == half:
            found = bound
            break
        if many < half:
            least = bound
        else:
            most = bound
    return found
