"""The forward pass of clustered attention."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import carray

from subquad_numpy.block_attention.tiles import INFINITY, is_finite, whole_tile
from subquad_numpy.clustered.members import (
    TOGETHER,
    add_values,
    add_values_of_four,
    has_bad,
    multiply_four,
    multiply_one,
    weigh_members,
)
from subquad_numpy.clustered.selection import choose, collect, find_bound, room_for, search
from subquad_numpy.clustered.tiles import ARRAYS, ROWS, SIZES, TILE, pack_queries, weigh
from subquad_numpy.codegen import (
    at_least,
    cut,
    load,
    pointer,
    room,
    shifted,
    store,
    zeros,
)
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.matmul import PANEL_VECTORS, TILE_ROWS, Panels, multiply, padded, rows_at, turned
from subquad_numpy.codegen.vector_math import LEAST, exp_negative
from subquad_numpy.runtime.arguments import fields

FORWARD_RECORD = fields(SIZES, ARRAYS, {"out": 2, "lse": 1})


@cache
def clustered_attention_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the output and the log-sum-exp of rows; a task is a block of rows."""
    lanes, kind, zero = element(dtype)
    panel = PANEL_VECTORS * lanes
    word = np.int32(0)
    whole_keys = padded(TILE, TILE_ROWS)

    @compiled(f"clustered attention {dtype}", FORWARD_RECORD)
    def forward(first: int, last: int, records: Any) -> int:
        f = carray(records, last)[0]
        d, d_v, n, clusters, size = f.d, f.d_v, f.n, f.clusters, f.size
        high_v, wide_v, wide_s = padded(d_v, TILE_ROWS), padded(d_v, lanes), padded(size, lanes)
        every = f.always + f.opened
        sizes = (
            *(d * panel, d * panel, padded(clusters, whole_keys) * panel, f.opened * panel),
            *(clusters, panel, panel, whole_keys * max(padded(d, TILE_ROWS), high_v), high_v * panel),
            *(ROWS * wide_v, ROWS, ROWS, wide_s, TOGETHER * wide_s, wide_s, d * size + lanes, size * d_v + wide_v),
            panel * room_for(f.opened, lanes),
            *(whole_keys, panel),
        )
        buffer = np.empty(room(sizes), kind)
        (
            packed, squares, x, bounds, logs, stops, nothing, own, sums, acc, top, seen, here, e, apart, own_k, own_v,
            values, fine, poison,
        ) = cut(buffer, sizes)  # fmt: skip
        left, starts, names = (
            np.zeros(clusters, np.int32),
            np.empty(clusters + 1, np.int32),
            np.empty(every + 1, np.int32),
        )
        opened, of_row = np.empty(ROWS * every, np.int32), np.empty(ROWS * every, np.int32)
        opens, collected = np.empty(ROWS, np.int32), np.empty(panel, np.int32)
        numbers_of = np.empty(panel * room_for(f.opened, lanes), np.int32)
        clear(nothing, panel)
        for s in range(wide_s):
            here[s] = s
        for task in range(first, last):
            f = carray(records, last)[task // f.tasks]
            row = task % f.tasks * ROWS
            count = min(ROWS, n - row)
            q, k, v, numbers = pointer(f.q, zero), pointer(f.k, zero), pointer(f.v, zero), pointer(f.numbers, zero)
            out, lse = pointer(f.out, zero), pointer(f.lse, zero)
            counts, stop = pointer(f.counts, word), pointer(f.stop, word)
            order, place = pointer(f.order, word), pointer(f.place, word)
            before_out, before_lse = pointer(f.before_out, zero), pointer(f.before_lse, zero)
            mean_values, scale = pointer(f.mean_values, zero), numbers[0]
            for c in range(clusters):
                logs[c] = math.log(counts[c]) if counts[c] > 0 else -INFINITY
                starts[c] = 0
            starts[clusters] = 0
            for base in range(0, count, panel):
                many_rows = min(panel, count - base)
                most, least = 0, clusters
                for c in range(panel):
                    limit = min(stop[row + base + c], clusters) if c < many_rows else 0
                    stops[c] = limit
                    most, least = max(most, limit), min(least, limit) if c < many_rows else least
                pack_queries(q, row + base, many_rows, d, panel, scale, packed, squares)
                weigh(
                    f, row + base, many_rows, most, panel, lanes, zero, word, packed, squares, logs, stops, left,
                    nothing, own, x,
                )  # fmt: skip
                if f.opened > 0:
                    find_bound(f.always, most, f.opened, panel, lanes, x, bounds)
                    collect(f.always, most, f.opened, panel, lanes, x, bounds, collected, values, numbers_of)
                for c in range(many_rows):
                    r = base + c
                    limit = int(stops[c])
                    many = min(f.always, limit)
                    for t in range(many):
                        names[t] = t
                    if f.opened > 0 and collected[c] <= room_for(f.opened, lanes):
                        many += choose(c, collected[c], f.opened, lanes, values, numbers_of, names, many)
                    elif f.opened > 0:
                        many += search(c, f.always, limit, f.opened, panel, x, values, names, many)
                    for i in range(many):
                        opened[r * every + i] = names[i]
                        starts[names[i] + 1] += 1
                        x[names[i] * panel + c] = -INFINITY
                    opens[r] = many
                for column in range(0, panel, lanes):
                    best = LEAST(zeros(x))
                    for t in range(most):
                        best = at_least(best, load(x, t * panel + column))
                    along = zeros(x)
                    for t in range(most):
                        weight = exp_negative(load(x, t * panel + column) - best)
                        store(x, t * panel + column, weight)
                        along = along + weight
                    store(shifted(top, base), column, best)
                    store(shifted(seen, base), column, along)
                    store(poison, column, zeros(x))
                clear(sums, high_v * panel)
                for j in range(0, most, TILE):
                    many = min(TILE, most - j)
                    b = whole_tile(mean_values, d_v, nothing, False, j, many, d_v, clusters, True, own)
                    if j + many > least and not is_finite(b, 0, many, d_v, lanes):
                        # 0 · NaN is NaN: values that are not finite are 0 here, and reach rows by `poison`
                        for t in range(many):
                            fine[t] = 1 if is_finite(b, t, 1, d_v, lanes) else 0
                            for p in range(high_v):
                                own[t * high_v + p] = b.data[t * b.row + p] if fine[t] != 0 and p < d_v else 0
                            if fine[t] == 0:
                                for c in range(panel):
                                    if stops[c] > j + t:
                                        poison[c] = math.nan
                        b = rows_at(own, high_v)
                    multiply(
                        turned(b), high_v, Panels(shifted(x, j * panel), many), many, panel, lanes,
                        rows_at(sums, panel), rows_at(sums, panel),
                    )  # fmt: skip
                for c in range(many_rows):
                    for p in range(d_v):
                        acc[(base + c) * wide_v + p] = sums[p * panel + c] + poison[c]
                    for p in range(d_v, wide_v):
                        acc[(base + c) * wide_v + p] = 0
            # rows by the clusters that they opened
            for c in range(clusters):
                starts[c + 1] += starts[c]
            for r in range(count):
                for i in range(opens[r]):
                    c = opened[r * every + i]
                    of_row[starts[c]] = r
                    starts[c] += 1
            begin = 0
            for c in range(clusters):
                end = starts[c]
                if end == begin:
                    continue
                keys, rows_v, many = shifted(k, c * d * size), shifted(v, c * size * d_v), counts[c]
                if c == clusters - 1:  # vectors read beyond the last row
                    for i in range(d * size):
                        own_k[i] = keys[i]
                    for i in range(size * d_v):
                        own_v[i] = rows_v[i]
                    keys, rows_v = own_k, own_v
                if f.place != 0:
                    for s in range(size):
                        apart[s] = order[c * size + s]
                reach = float(f.reach) if f.place != 0 else -1.0
                careful = f.place != 0 and has_bad(rows_v, many, d_v)
                i = begin
                while i < end:
                    together = TOGETHER if end - i >= TOGETHER and not careful else 1
                    if together == TOGETHER:
                        r_0, r_1, r_2, r_3 = of_row[i], of_row[i + 1], of_row[i + 2], of_row[i + 3]
                        multiply_four(
                            shifted(q, (row + r_0) * d), shifted(q, (row + r_1) * d), shifted(q, (row + r_2) * d),
                            shifted(q, (row + r_3) * d), keys, d, size, lanes, scale, e, wide_s,
                        )  # fmt: skip
                    else:
                        multiply_one(shifted(q, (row + of_row[i]) * d), keys, d, size, lanes, scale, e)
                    for t in range(together):
                        r = of_row[i + t]
                        at = float(place[row + r]) if f.place != 0 else 0.0
                        weigh_members(
                            shifted(e, t * wide_s), size, many, r, wide_v, lanes, apart, at, reach, here, top, seen,
                            shifted(acc, r * wide_v),
                        )  # fmt: skip
                    if together == TOGETHER:
                        add_values_of_four(
                            e, wide_s, many, rows_v, d_v, wide_v, lanes, shifted(acc, of_row[i] * wide_v),
                            shifted(acc, of_row[i + 1] * wide_v), shifted(acc, of_row[i + 2] * wide_v),
                            shifted(acc, of_row[i + 3] * wide_v),
                        )  # fmt: skip
                    elif careful:
                        for s in range(many):
                            if e[s] != 0 or abs(apart[s] - place[row + of_row[i]]) > f.reach:
                                weights = shifted(e, s)
                                add_values(
                                    weights,
                                    1,
                                    shifted(rows_v, s * d_v),
                                    d_v,
                                    wide_v,
                                    lanes,
                                    shifted(acc, of_row[i] * wide_v),
                                )
                    else:
                        add_values(e, many, rows_v, d_v, wide_v, lanes, shifted(acc, of_row[i] * wide_v))
                    i += together
                begin = end
            for r in range(count):
                found = seen[r]
                level = top[r] + math.log(found) if found != 0 else -INFINITY
                factor = 1 / found if found != 0 else found
                share, joins = found, False  # `found` may be NaN
                if f.before_lse != 0 and before_lse[row + r] != -INFINITY:  # join the output over other keys
                    joins = True
                    both = max(level, before_lse[row + r])
                    old = math.exp(before_lse[row + r] - both)
                    new = math.exp(level - both) if found != 0 else old * 0
                    share, factor, level = old / (old + new), factor * new / (old + new), both + math.log(old + new)
                for p in range(d_v):
                    value = acc[r * wide_v + p] * factor if found != 0 else found
                    if joins:
                        value += before_out[(row + r) * d_v + p] * share
                    out[(row + r) * d_v + p] = value
                lse[row + r] = level
        buffer[0] = 0  # see `cut`
        return DONE

    return forward
