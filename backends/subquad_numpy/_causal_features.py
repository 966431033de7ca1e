"""Causal attention through exponential features, fused: the state of a head and a block of rows never leave its cache.

    out[i] = Σ_{j ≤ i} w[i, j] v[j] / Σ_{j ≤ i} w[i, j],    w[i, j] = exp(y[i]) · exp(x[j]),  over features
    y[i] = q[i] U,    x[j] = k[j] W − h |k[j]|²

of q and k less their centers. Blocks of rows come one after the other: what the state holds of earlier keys,
S = Σ_j exp(x[j] − shift) v[j]ᵀ and s, and the keys of the block pair by pair. No row depends on a later key, not even
in its last bit. Exponents are taken relative to the state's shift, or in a first block to the first key; each key is
scaled by its own largest feature exp(a[j]), and row i by exp(−R[i]), R[i] half the largest a[j] that it sees, so that
neither the state nor the new keys underflow. The first row where that does not suffice, as `_causal_block` of
`subquad.kernels.feature_product` says, is reported and ends the item.

Linear attention has y and x without a matrix, and features elu(y) + 1: see `_maps`.

Features are rows and keys lanes here: x is (m, block), so that sums over features need nothing of neighbouring lanes.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray

from subquad_numpy._compile import DONE, compiled, fingerprint
from subquad_numpy._maps import log_after, log_of, times_value
from subquad_numpy._math import exp_negative
from subquad_numpy._product import PANEL, TILE_ROWS, multiply, pack, panel_at
from subquad_numpy._simd import (
    aligned,
    at_least,
    at_most,
    lanes_of,
    largest,
    load,
    pointer,
    shifted,
    spread,
    store,
    total,
    where_negative,
    zeros,
)
from subquad_numpy._tile import clear, load_part, row_in, store_part

CAUSAL_FRAME = (
    # a task is an item: n rows of queries and of keys
    *("n", "d", "m", "d_v"),
    # elements from row to row, of U and W also from column to column
    *("q_row", "k_row", "v_row", "U_row", "U_step", "W_row", "W_step"),
    # addresses; mask is of bytes, or 0; centers: (…, d), or 0; numbers are (h, factor of U, of W) or of q, k
    *("q", "k", "v", "U", "W", "mask", "q_center", "k_center", "numbers"),
    # table of int64: a row (q, k, v, U, W, mask, q_center, k_center) for each item: elements to its first
    "table",
    # the state before: (items, m), −∞ where no key was; (items, m, d_v); (items, m)
    *("shift", "kv", "k_sum"),
    # (items, n, d_v); (items,) of int64: the first row that is not done
    *("out", "undone"),
)


@cache
def causal_kernel(dtype: np.dtype[Any], elu: bool) -> Any:
    """Compile `attend(first, last, frame)`."""
    lanes = lanes_of(dtype)
    block = PANEL * lanes  # rows: the columns of one panel
    high = -(-block // TILE_ROWS) * TILE_ROWS
    kind = numba.from_dtype(dtype)
    zero, one, lowest = dtype.type(0), dtype.type(1), dtype.type(-np.inf)
    half, nothing_known = dtype.type(0.5), dtype.type(np.nan)
    least = np.finfo(dtype).min
    # of a product below, some features are lost; nor may an exponential overflow in half of the range
    least_product = dtype.type(np.finfo(dtype).smallest_normal / np.finfo(dtype).eps ** 2)
    most_above = dtype.type(160 if dtype.itemsize == 4 else 1400)
    far, huge = dtype.type(1e30), np.finfo(dtype).max
    stamp = fingerprint()

    @compiled(f"causal features {dtype}{' elu' * elu}", CAUSAL_FRAME)
    def attend(first: int, last: int, frame: Any) -> int:
        stamp  # noqa: B018  part of the key of the cache on disk
        f = carray(frame, 1)[0]
        n, d, m, d_v = f.n, f.d, f.m, f.d_v
        q_row, k_row, v_row = f.q_row, f.k_row, f.v_row
        U_row, U_step, W_row, W_step = f.U_row, f.U_step, f.W_row, f.W_step
        all_q, all_k, all_v = pointer(f.q, zero), pointer(f.k, zero), pointer(f.v, zero)
        all_U, all_W = pointer(f.U, zero), pointer(f.W, zero)
        has_mask, all_masks = f.mask != 0, pointer(f.mask, np.uint8(0))
        has_center, q_centers, k_centers = f.q_center != 0, pointer(f.q_center, zero), pointer(f.k_center, zero)
        numbers, table = pointer(f.numbers, zero), pointer(f.table, np.int64(0))
        shifts, all_kv, all_sums = pointer(f.shift, zero), pointer(f.kv, zero), pointer(f.k_sum, zero)
        outs, undone = pointer(f.out, zero), pointer(f.undone, np.int64(0))
        half_scale, q_factor, k_factor = numbers[0], numbers[1], numbers[2]

        width = -(-m // lanes) * lanes
        height = -(-width // TILE_ROWS) * TILE_ROWS
        stride = -(-height // lanes) * lanes  # features, in whole vectors and tiles
        d_in, d_out, depth = -(-d // lanes) * lanes, -(-d_v // lanes) * lanes, d + 1
        size = 4 * stride + max(stride, d_out, block) + 2 * d_in + 3 * block
        size += d * width + stride * depth + 2 * stride * block + m * d_out + stride * d_out
        size += depth * block + block * d_out + high * (d + stride + block + 2 * d_out) + 2 * high
        buffer = np.empty(size + 2 * lanes, kind)
        edge = aligned(buffer)
        shift = shifted(edge, lanes)
        reference = shifted(shift, stride)
        k_sum = shifted(reference, stride)
        spare = shifted(k_sum, stride)
        nothing = shifted(spare, stride)
        q_center = shifted(nothing, max(stride, d_out, block))
        k_center = shifted(q_center, d_in)
        top = shifted(k_center, d_in)  # of each key, its largest exponent over ρ
        later = shifted(top, block)  # two vectors' worth: 0 … 0 −∞ … −∞, read from any lane on
        packed = shifted(later, 2 * block)
        turned = shifted(packed, d * width)  # W turned, with a last column of ones
        x = shifted(turned, stride * depth)
        phi_k = shifted(x, stride * block)
        kv = shifted(phi_k, stride * block)  # in panels
        part = shifted(kv, m * d_out)
        keys = shifted(part, stride * d_out)  # (depth, block), the last row −h|k|²
        above = keys if elu else x  # what φ's value is made of
        values = shifted(keys, depth * block)  # in panels
        rows = shifted(values, block * d_out)
        phi_q = shifted(rows, high * d)
        weights = shifted(phi_q, high * stride)
        result = shifted(weights, high * block)
        from_state = shifted(result, high * d_out)
        seen = shifted(from_state, high * d_out)  # φ_q · s, of each row
        clear(nothing, max(stride, d_out, block))
        clear(q_center, 2 * d_in)
        clear(phi_q, high * (stride + block))
        clear(turned, stride * depth)
        for j in range(2 * block):
            later[j] = 0 if j < block else lowest
        finite = zeros(edge) + least

        for item in range(first, last):
            entry = item * 8
            q, k, v = (
                shifted(all_q, table[entry]), shifted(all_k, table[entry + 1]), shifted(all_v, table[entry + 2])
            )  # fmt: skip
            mask, out = shifted(all_masks, table[entry + 5]), shifted(outs, item * n * d_v)
            if has_center:
                row_in(q_centers, table[entry + 6], d, lanes, q_center)
                row_in(k_centers, table[entry + 7], d, lanes, k_center)
            if not elu:
                pack(shifted(all_U, table[entry + 3]), U_row, U_step, d, m, q_factor, lanes, packed, d)
                W = shifted(all_W, table[entry + 4])
                for i in range(m):
                    for p in range(d):
                        turned[i * depth + p] = W[p * W_row + i * W_step] * k_factor
                    turned[i * depth + d] = 1
            pack(shifted(all_kv, item * m * d_v), d_v, 1, m, d_v, one, lanes, kv, m)
            for i in range(stride):
                shift[i] = shifts[item * m + i] if i < m else lowest
                k_sum[i] = all_sums[item * m + i] if i < m else 0

            row, poisoned, lost = 0, False, False
            while row < n and not poisoned:
                count = min(block, n - row)
                clear(keys, depth * block)
                clear(values, block * d_out)
                for r in range(count):
                    for p in range(0, d, lanes):
                        y = load_part(q, (row + r) * q_row + p, d - p, lanes, edge) - load(q_center, p)
                        if elu:
                            store(phi_q, r * stride + p, y * q_factor)
                        else:
                            store_part(rows, r * d + p, y, d - p, lanes, edge)
                    if has_mask and mask[row + r] == 0:
                        continue
                    square, odd = zeros(rows), zeros(rows)
                    for p in range(0, d, lanes):
                        y = load_part(k, (row + r) * k_row + p, d - p, lanes, edge)
                        odd = odd + (y - y)  # not 0 if the number is not finite
                        y = y - load(k_center, p)
                        square = square + y * y
                        store(spare, 0, y)
                        for lane in range(min(lanes, d - p)):
                            keys[(p + lane) * block + r] = spare[lane]
                    for j in range(0, d_v, lanes):
                        y = load_part(v, (row + r) * v_row + j, d_v - j, lanes, edge)
                        odd = odd + (y - y)
                        before, columns = panel_at(j, d_out, lanes)
                        store(values, before * block + r * columns + j - before, y)
                    # |k|² overflows long before k itself, and 0 · ∞ is NaN
                    keys[d * block + r] = -half_scale * total(square) if half_scale != 0 else 0
                    if total(odd) != 0:  # this row and all later ones see it
                        poisoned = True
                        count = r
                        break
                whole = -(-count // TILE_ROWS) * TILE_ROWS
                if count == 0:
                    break

                if elu:
                    for i in range(0, m * block, lanes):
                        store(keys, i, load(keys, i) * k_factor)
                        store(x, i, log_of(load(keys, i), elu))
                else:
                    multiply(turned, depth, 1, height, keys, depth, depth, block, lanes, nothing, 0, x, block)
                for r in range(block):
                    if r >= count or (has_mask and mask[row + r] == 0):
                        for i in range(m):
                            x[i * block + r] = lowest
                            if elu:
                                keys[i * block + r] = 0
                empty = True
                for i in range(m):
                    known = shift[i] != lowest
                    empty = empty and not known
                    start = shift[i] if known else x[i * block]
                    reference[i] = start if start != lowest else 0
                for i in range(m, stride):
                    reference[i] = lowest
                if not elu:
                    for i in range(count * d, whole * d):
                        rows[i] = 0
                    multiply(rows, d, 1, whole, packed, d, d, width, lanes, reference, 0, phi_q, stride)
                for r in range(count):
                    high_lanes = log_after(load(phi_q, r * stride), reference, 0, elu)
                    for i in range(lanes, width, lanes):
                        high_lanes = at_least(log_after(load(phi_q, r * stride + i), reference, i, elu), high_lanes)
                    highest = largest(high_lanes)
                    if highest == lowest:
                        highest = zero
                    along = zeros(rows)
                    for i in range(0, width, lanes):
                        y = load(phi_q, r * stride + i)
                        e = times_value(exp_negative(log_after(y, reference, i, elu) - highest), y, elu)
                        store(phi_q, r * stride + i, e)
                        along = along + e * load(k_sum, i)
                    seen[r] = total(along)

                for j in range(0, block, lanes):
                    most = zeros(rows) + lowest
                    for i in range(m):
                        most = at_least(load(x, i * block + j) - spread(reference, i), most)
                    store(top, j, most)
                    most = at_least(most, finite)
                    for i in range(m):
                        e = exp_negative((load(x, i * block + j) - spread(reference, i)) - most)
                        store(phi_k, i * block + j, times_value(e, load(above, i * block + j), elu))
                multiply(phi_q, stride, 1, whole, phi_k, m, m, block, lanes, nothing, 0, weights, block)
                most_seen = lowest
                for r in range(count):
                    most_seen = max(most_seen, top[r])
                    pivot = most_seen if most_seen != lowest else zero
                    smallest = zeros(rows) + huge
                    for j in range(0, block, lanes):
                        a = load(top, j) + load(later, block - 1 - r + j)
                        smallest = at_most(where_negative(a + far, smallest, load(weights, r * block + j)), smallest)
                    if -largest(-smallest) < least_product or (pivot > most_above and not empty):
                        lost = True
                        count = r
                        break
                    divisor = pivot
                    if not empty:
                        divisor = pivot * half if pivot > 0 else zero
                        pivot = max(pivot, zero)
                    store(spare, 0, exp_negative(zeros(rows) + (divisor - pivot)))
                    grown = one / spare[0]
                    store(spare, 0, exp_negative(zeros(rows) - (zero if empty else divisor)))
                    held = spare[0]
                    weight = zeros(rows)
                    for j in range(0, block, lanes):
                        a = load(top, j) + load(later, block - 1 - r + j)
                        w = load(weights, r * block + j) * (exp_negative(a - pivot) * grown)
                        store(weights, r * block + j, w)
                        weight = weight + w
                    edge[0] = total(weight) + held * seen[r]
                    seen[r] = one / edge[0] if edge[0] != 0 else zero
                    rows[r] = held  # the queries have been read
                multiply(weights, block, 1, whole, values, block, count, d_out, lanes, nothing, 0, result, d_out)
                multiply(phi_q, stride, 1, whole, kv, m, m, d_out, lanes, nothing, 0, from_state, d_out)
                for r in range(count):
                    held_row, inverse = spread(rows, r), spread(seen, r)
                    for j in range(0, d_v, lanes):
                        value = load(result, r * d_out + j) + held_row * load(from_state, r * d_out + j)
                        store_part(out, (row + r) * d_v + j, value * inverse, d_v - j, lanes, edge)
                row += count
                if poisoned or lost or row == n:
                    break

                for i in range(m):
                    widest = load(x, i * block)
                    for j in range(lanes, block, lanes):
                        widest = at_least(load(x, i * block + j), widest)
                    new = max(shift[i], largest(widest))
                    start = new if new != lowest else zero
                    along = zeros(rows)
                    for j in range(0, block, lanes):
                        e = times_value(exp_negative(load(x, i * block + j) - start), load(above, i * block + j), elu)
                        store(x, i * block + j, e)
                        along = along + e
                    store(spare, 0, exp_negative(zeros(rows) + (shift[i] - start)))
                    reference[i] = spare[0]
                    k_sum[i] = k_sum[i] * spare[0] + total(along)
                    shift[i] = new
                multiply(x, block, 1, height, values, block, count, d_out, lanes, nothing, 0, part, d_out)
                for i in range(m):
                    fade = spread(reference, i)
                    for j in range(0, d_out, lanes):
                        before, columns = panel_at(j, d_out, lanes)
                        place = before * m + i * columns + j - before
                        store(kv, place, load(kv, place) * fade + load(part, i * d_out + j))
            undone[item] = row if lost else n
            for i in range(row * d_v, n * d_v):
                out[i] = nothing_known
        buffer[0] = 0  # see `aligned`
        return DONE

    return attend
