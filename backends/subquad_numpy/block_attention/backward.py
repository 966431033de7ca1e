"""The gradient of block attention, from the output and the log-sum-exp of the forward pass.

With weights P = exp(x − lse), and D[i] = dout[i]·out[i] − dlse[i],

    dv[j] = Σ_i P[i, j] dout[i],    dx[i, j] = P[i, j] (dout[i]·v[j] − D[i]),    dq = s dx k,    dk = s dxᵀ q

0 · NaN is NaN: what is not finite must not reach the gradients of rows and keys that do not see it. Queries and keys
that are not finite are therefore 0 in the products; where they are seen, dx is NaN.

A task takes every `parts`-th tile of rows of an item, and adds the gradients of its keys up in sums of its own.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.block_attention.tiles import (
    ARRAYS,
    INFINITY,
    KEYS,
    ROWS,
    SIZES,
    Limits,
    at,
    hide,
    is_finite,
    load_limits,
    pack_rows,
    task_rows,
    whole_tile,
)
from subquad_numpy.codegen import cut, load, pointer, room, shifted, store, where_negative, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.matmul import PANEL_VECTORS, TILE_ROWS, Panels, multiply, padded, place_in, rows_at, turned
from subquad_numpy.codegen.stored import row_of, stored_as
from subquad_numpy.codegen.vector_math import LEAST, exp_negative
from subquad_numpy.runtime.arguments import fields

# The tiles of rows of an item are shared by `parts` tasks; `k_step` and `v_step` are the elements of a part of dk, dv
BACKWARD_RECORD = fields(
    SIZES,
    dict.fromkeys(("parts", "k_step", "v_step")),
    ARRAYS,
    {"out": 2, "lse": 1, "grad_out": 2, "grad_lse": 1, "grad_q": 2, "grad_k": 2, "grad_v": 2},
)


@cache
def block_attention_gradient_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the gradients by queries, keys and values."""
    lanes, kind, zero = element(dtype)
    panel = PANEL_VECTORS * lanes
    width = -(-ROWS // panel) * panel
    word, byte = np.int32(0), np.uint8(0)
    keys = -(-KEYS // TILE_ROWS) * TILE_ROWS

    @compiled(f"block attention gradient {dtype}", BACKWARD_RECORD)
    def backward(first: int, last: int, records: Any) -> int:
        f = records[0]
        d, d_v, n_kv, size, listed, parts = f.d, f.d_v, f.n_kv, f.size, f.listed, f.parts
        high, wide, wide_v = padded(d, TILE_ROWS), padded(d, lanes), padded(d_v, lanes)
        sizes = (
            *(width, width, width, f.rounds * width, width, width, max(wide, wide_v, panel)),
            *(d * width, d_v * width, wide * width, wide_v * width, keys * panel, keys * panel),
            *(high * width, high * panel, keys * wide, keys * wide_v),
            *(keys * padded(d, TILE_ROWS), keys * padded(d, TILE_ROWS), keys * padded(d_v, TILE_ROWS)),
            *(width * max(d, d_v), d_v),
        )
        buffer = np.empty(room(sizes), kind)
        cuts = cut(buffer, sizes)
        before, stop, avoid, met, level, drop, nothing = cuts[:7]
        q, grad, q_rows, grad_rows, x, slope = cuts[7:13]
        by_q, part, by_k, by_v, own_k, own_turned, own_v, wide_row, wide_out = cuts[13:]
        q_as, k_as = stored_as(f.stored, 0), stored_as(f.stored, 1)
        v_as, out_as, by_as = stored_as(f.stored, 2), stored_as(f.stored, 3), stored_as(f.stored, 4)
        limits = Limits(before, stop, avoid, met)
        clear(nothing, max(wide, wide_v, panel))
        for task in range(first, last):
            f = records[task // parts]
            k, v, numbers, blocks = (
                pointer(f.k, zero),
                pointer(f.v, zero),
                pointer(f.numbers, zero),
                pointer(f.blocks, word),
            )
            rows, out, lse = pointer(f.q, zero), pointer(f.out, zero), pointer(f.lse, zero)
            grad_out, grad_lse = pointer(f.grad_out, zero), pointer(f.grad_lse, zero)
            grad_q, order_q, order_k = pointer(f.grad_q, zero), pointer(f.order_q, word), pointer(f.order_k, word)
            has_q, has_k = f.order_q != 0, f.order_k != 0
            grad_k = shifted(pointer(f.grad_k, zero), task % parts * f.k_step)
            grad_v = shifted(pointer(f.grad_v, zero), task % parts * f.v_step)
            every = f.place == 0 and not has_k and f.avoid == 0 and f.rounds == 0 and f.mask == 0
            for tile in range(task % parts, f.tiles, parts):
                block, row, count = task_rows(tile, f.n, size, ROWS, listed)
                if count == 0:
                    continue
                used = padded(count, panel)
                low, upper, inner_low, inner_high = load_limits(f, row, count, width, word, limits)
                pack_rows(
                    rows, q_as, f.q_row, order_q, has_q, row, count, d, used, numbers[0], q, lanes, wide_row
                )  # fmt: skip
                pack_rows(
                    grad_out, by_as, d_v, order_q, has_q, row, count, d_v, used, 1, grad, lanes, wide_row
                )  # fmt: skip
                for base in range(0, used, panel):
                    clear(shifted(q_rows, base * wide), panel * wide)
                    clear(shifted(grad_rows, base * wide_v), panel * wide_v)
                    here = min(panel, count - base)
                    for c in range(here):
                        mine = at(order_q, has_q, row + base + c)
                        own = Panels(shifted(q_rows, base * wide), panel)
                        query = row_of(rows, q_as, mine * f.q_row, d, lanes, wide_row)
                        fine = is_finite(rows_at(query, 0), 0, 1, d, lanes)
                        for p in range(d):
                            value = query[p] * numbers[0] if fine else numbers[0] * 0
                            own.data[place_in(own, c, p, wide, lanes)] = value
                        own = Panels(shifted(grad_rows, base * wide_v), panel)
                        by_out = row_of(grad_out, by_as, mine * d_v, d_v, lanes, wide_row)
                        for p in range(d_v):
                            own.data[place_in(own, c, p, wide_v, lanes)] = by_out[p]
                for c in range(used):
                    level[c], drop[c] = INFINITY, 0
                    mine = at(order_q, has_q, row + c) if c < count else 0
                    if c < count and lse[mine] != -INFINITY:
                        level[c] = lse[mine]
                        along = numbers[0] * 0
                        by_out = row_of(grad_out, by_as, mine * d_v, d_v, lanes, wide_row)
                        own_out = row_of(out, out_as, mine * d_v, d_v, lanes, wide_out)
                        for p in range(d_v):
                            along += by_out[p] * own_out[p]
                        drop[c] = along - (grad_lse[mine] if f.grad_lse != 0 else 0)
                clear(by_q, high * used)
                for entry in range(max(listed, 1)):
                    begin, end = (low // KEYS * KEYS, upper) if f.place == 0 else (0, n_kv)
                    if listed > 0:
                        number = blocks[block * listed + entry]
                        begin, end = number * size, min((number + 1) * size, n_kv)
                        if number < 0:
                            end = begin
                    for j in range(begin, end, KEYS):
                        many = min(KEYS, end - j)
                        if f.place == 0 and not has_k and (j >= upper or j + many <= low):
                            continue
                        is_whole = every and j >= inner_low and j + many <= inner_high
                        whole = padded(many, TILE_ROWS)
                        a = whole_tile(k, k_as, f.k_row, order_k, has_k, j, many, d, n_kv, False, lanes, own_k)
                        a_turned = whole_tile(
                            k, k_as, f.k_row, order_k, has_k, j, many, d, n_kv, True, lanes, own_turned
                        )  # fmt: skip
                        if not is_whole and not is_finite(a_turned, 0, many, d, lanes):
                            for t in range(many):
                                reads = d if is_finite(a_turned, t, 1, d, lanes) else 0
                                for p in range(high):
                                    own_turned[t * high + p] = a_turned.data[t * a_turned.row + p] if p < reads else 0
                            a_turned = rows_at(own_turned, high)
                        b = whole_tile(v, v_as, f.v_row, order_k, has_k, j, many, d_v, n_kv, False, lanes, own_v)
                        clear(by_k, keys * wide)
                        clear(by_v, keys * wide_v)
                        for base in range(0, used, panel):
                            multiply(
                                a, whole, Panels(shifted(q, base * d), d), d, panel, lanes, rows_at(nothing, 0),
                                rows_at(x, panel),
                            )  # fmt: skip
                            multiply(
                                b, whole, Panels(shifted(grad, base * d_v), d_v), d_v, panel, lanes,
                                rows_at(nothing, 0), rows_at(slope, panel),
                            )  # fmt: skip
                            for column in range(0, panel, lanes):
                                i = base + column
                                if not is_whole:
                                    hide(f, j, many, i, width, limits, word, byte, column, x, panel)
                                for t in range(many):
                                    cell = t * panel + column
                                    logit = load(x, cell)
                                    weight = exp_negative(logit - load(level, i))
                                    change = weight * (load(slope, cell) - load(drop, i))
                                    shown = logit - LEAST(logit)  # negative for a hidden pair alone
                                    store(x, cell, where_negative(shown, zeros(x), weight))
                                    store(slope, cell, where_negative(shown, zeros(x), change))
                                for t in range(many, whole):
                                    store(x, t * panel + column, zeros(x))
                                    store(slope, t * panel + column, zeros(x))
                            multiply(
                                rows_at(x, panel), whole, Panels(shifted(grad_rows, base * wide_v), panel), panel,
                                wide_v, lanes, rows_at(by_v, wide_v), rows_at(by_v, wide_v),
                            )  # fmt: skip
                            multiply(
                                rows_at(slope, panel), whole, Panels(shifted(q_rows, base * wide), panel), panel,
                                wide, lanes, rows_at(by_k, wide), rows_at(by_k, wide),
                            )  # fmt: skip
                            multiply(
                                turned(a_turned), high, Panels(slope, many), many, panel, lanes, rows_at(nothing, 0),
                                rows_at(part, panel),
                            )  # fmt: skip
                            for p in range(0, high * panel, lanes):
                                store(by_q, base * high + p, load(by_q, base * high + p) + load(part, p))
                        for t in range(many):
                            mine = at(order_k, has_k, j + t)
                            for p in range(d):
                                grad_k[mine * d + p] += by_k[t * wide + p]
                            for p in range(d_v):
                                grad_v[mine * d_v + p] += by_v[t * wide_v + p]
                for c in range(count):
                    place, mine = c // panel * panel * high + c % panel, at(order_q, has_q, row + c)
                    for p in range(d):
                        grad_q[mine * d + p] += by_q[place + p * panel] * numbers[0]
        return DONE

    return backward
