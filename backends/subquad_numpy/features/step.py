"""Causal attention through exponential features, fused: a head's state and a block of rows stay in a core's cache.

    out[i] = Σ_{j ≤ i} w[i, j] v[j] / Σ_{j ≤ i} w[i, j],    w[i, j] = exp(y[i]) · exp(x[j]),  over features
    y[i] = q[i] U,    x[j] = k[j] W − h |k[j]|²

where q and k stand for rows less their centers. Linear attention has no U and W, and features elu(y) + 1: see `phi`.

Blocks of rows are computed in order. A row reads earlier blocks through the state, S = Σ_j exp(x[j] − shift) v[j]ᵀ and
s, and the keys of its own block pair by pair. No row depends on a later key, not even in its last bit.

Exponents are relative to ρ: the state's shift, or in a first block the exponents of the first key. Each key is scaled
by its own largest feature exp(a[j]). Row i is scaled by exp(−R[i]), where R[i] is half the largest a[j] that the row
sees, so that neither the state nor the new keys underflow. Where that does not suffice, by the criterion of
`causal_block` of `subquad.kernels.feature_causal`, the kernel reports the row and ends the item there.

Keys are in transposed blocks, with one row per feature (`transposed`).
"""

import math
from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import (
    copy,
    cut,
    lanes_of,
    load,
    pointer,
    replace_where_zero,
    room,
    shifted,
    spread,
    store,
    total,
    zeros,
)
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row
from subquad_numpy.codegen.matmul import (
    PANEL_VECTORS,
    TILE_ROWS,
    Matrix,
    Panels,
    into_panels,
    multiply,
    pack,
    padded,
    place_in,
    rows_at,
)
from subquad_numpy.codegen.stored import asked_rows, load_stored_part, put_number, store_stored_part, stored_as
from subquad_numpy.codegen.turn import maxima, totals
from subquad_numpy.features.blocks import (
    HEAD,
    KEYS,
    OF_KEYS,
    OUTPUT,
    QUERIES,
    SIDE,
    VALUES,
    Scratch,
    Side,
    State,
    directions_of,
    query_exponents,
    query_features,
    widths_of,
)
from subquad_numpy.features.causal import add_features, append_squares, scale_rows, shift_on, weigh
from subquad_numpy.features.phi import ELU, MAPS
from subquad_numpy.features.transposed import (
    Asked,
    Block,
    choose_reference,
    exponents,
    features,
    hide,
    largest_exponents,
    load_directions,
    product,
    rows_to_lanes,
)
from subquad_numpy.runtime.arguments import fields

# An item is one task. The fields q_* are the queries' `SIDE`, those without prefix are the keys'.
STEP_RECORD = fields(
    HEAD,
    OF_KEYS,
    {f"q_{name}": axes for name, axes in SIDE.items()},
    # the state before, or address 0; the shift is −∞ for a feature without a key
    {"shift": 2, "kv": 2, "k_sum": 2, "out": 2},
    # the first row that is not done, int64; n: all rows and the state are done; n + 1: all rows, but not the state
    {"undone": 0},
    # for the gradient, or address 0: log of each row's sum of weights (∞ if it sees no key); shift before each block
    {"level": 1, "shifts": 2},
    # contiguous: the state after the last row, written only if `keeps` is not 0
    {"keeps": None, "new_shift": 2, "new_kv": 2, "new_k_sum": 2},
)


def block_rows(dtype: np.dtype[Any]) -> int:
    """The number of rows of a block: the columns of one panel."""
    return PANEL_VECTORS * lanes_of(dtype)


@cache
def step_kernel(dtype: np.dtype[Any], phi_name: str) -> Any:
    """Compile the causal step; a task is one item."""
    lanes, kind, zero = element(dtype)
    phi = MAPS[phi_name].number
    block = block_rows(dtype)
    high = -(-block // TILE_ROWS) * TILE_ROWS
    one, lowest = dtype.type(1), dtype.type(-np.inf)
    half, nothing_known = dtype.type(0.5), dtype.type(np.nan)
    # A product of features below `least_product` has lost digits to underflow. An exponent R[i] above half of
    # `most_above` would overflow. A key whose a[j] is below −`far` is hidden, or later than the row.
    least_product = dtype.type(np.finfo(dtype).smallest_normal / np.finfo(dtype).eps ** 2)
    most_above = dtype.type(160 if dtype.itemsize == 4 else 1400)
    far, huge = dtype.type(1e30), np.finfo(dtype).max

    @compiled(f"step {dtype} {phi_name}", STEP_RECORD)
    def step(first: int, last: int, frames: Any) -> int:
        f = frames[0]
        n, d, m, d_v = f.n, f.d, f.m, f.d_v
        k_as, v_as = stored_as(f.stored, KEYS), stored_as(f.stored, VALUES)
        q_as, out_as = stored_as(f.stored, QUERIES), stored_as(f.stored, OUTPUT)
        depth = d + 1  # the last number of a key is −h|k|²
        width, height, stride, d_in, d_out = widths_of(m, d, d_v, lanes)
        widest = max(stride, d_out, block)
        sizes = (
            *(lanes, stride, stride, stride, stride, widest, d_in, d_in, block, 2 * block),
            *(d * width, stride * depth, stride * block, stride * block, m * d_out, stride * d_out),
            *(depth * block, block * d_out, high * d, high * stride, high * block, high * d_out, high * d_out),
            *(high, high, block * d_in),
            *(block, block, block, block, block, block, block),
        )
        buffer = np.empty(room(sizes), kind)
        # reference, opposite    ρ and −ρ                    kv, values    in panels
        # top                    a[j], largest exponent over ρ of each key
        # later                  block times 0, block times −∞: added from place block − 1 − r on, it hides keys after r
        # turned                 Wᵀ with a last column of ones
        # keys                   (depth, block), the last row −h|k|²
        # seen                   φ_q · s of each row
        # lined                  keys less their center, row by row
        # peaks                  largest a[j] that each row sees, 0 if it sees none; faded: exp(-R)
        (
            edge, shift, reference, opposite, k_sum, nothing, q_center, k_center, top, later,
            packed, turned, x, phi_k, kv, part,
            keys, values, rows, phi_q, weights, result, from_state, seen, highest, lined,
            peaks, pivots, divisors, grown, faded, least, row_sums,
        ) = cut(buffer, sizes)  # fmt: skip
        above = keys if phi == ELU else x  # the y of which φ's value is a function
        clear(nothing, widest)
        clear(q_center, d_in)
        clear(k_center, d_in)
        clear(phi_q, high * stride)
        clear(weights, high * block)
        clear(turned, stride * depth)
        for j in range(2 * block):
            later[j] = 0 if j < block else lowest

        space, scratch = Block(block, lanes, nothing, edge), Scratch(rows, nothing, edge)
        directions, numerator, value_panels = Panels(packed, d), Panels(kv, m), Panels(values, block)
        phi_rows, pairs, products = rows_at(phi_q, stride), rows_at(weights, block), rows_at(result, d_out)
        earlier, part_rows, zero_row = rows_at(from_state, d_out), rows_at(part, d_out), rows_at(nothing, 0)

        for item in range(first, last):
            f = frames[item]
            q, k, v = pointer(f.q_x, zero), pointer(f.x, zero), pointer(f.v, zero)
            q_row, k_row, v_row = f.q_x_row, f.x_row, f.v_row
            has_mask, mask, out = f.mask != 0, pointer(f.mask, np.uint8(0)), pointer(f.out, zero)
            level = pointer(f.level, zero)
            q_numbers, numbers = pointer(f.q_numbers, zero), pointer(f.numbers, zero)
            k_factor, half_scale = numbers[0], numbers[1]
            if f.center != 0:
                load_padded_row(pointer(f.q_center, zero), 0, d, lanes, q_center)
                load_padded_row(pointer(f.center, zero), 0, d, lanes, k_center)
            if phi != ELU:
                U = Matrix(pointer(f.q_W, zero), f.q_W_row, f.q_W_column)
                pack(U, d, m, q_numbers[0], lanes, directions)
                load_directions(directions_of(f, zero), d, m, k_factor, turned)
            queries = Side(d, q_center, q_numbers, directions, width)
            has_state = f.shift != 0
            if has_state:
                pack(rows_at(pointer(f.kv, zero), d_v), m, d_v, one, lanes, numerator)
            else:
                clear(kv, m * d_out)
            shifts, sums = pointer(f.shift, zero), pointer(f.k_sum, zero)
            for i in range(stride):
                shift[i] = shifts[i] if has_state and i < m else lowest
                k_sum[i] = sums[i] if has_state and i < m else 0

            # poisoned: a key or value is not finite, which spoils its row and all later ones
            # lost: a row needs the generic form, since features underflow or overflow
            row, poisoned, lost = 0, False, False
            while row < n and not poisoned:
                count = min(block, n - row)
                clear(lined, block * d_in)
                clear(weights, block * lanes)
                clear(values, block * d_out)
                strange = zeros(rows)
                for r in range(count):
                    if has_mask and mask[row + r] == 0:
                        continue
                    odd = zeros(rows)
                    for p in range(0, d, lanes):
                        y = load_stored_part(k, k_as, (row + r) * k_row + p, d - p, lanes, edge)
                        odd = odd + (y - y)  # 0 for finite numbers, else NaN
                        store(lined, r * d_in + p, y - load(k_center, p))
                    for j in range(0, d_v, lanes):
                        y = load_stored_part(v, v_as, (row + r) * v_row + j, d_v - j, lanes, edge)
                        odd = odd + (y - y)
                        into_panels(value_panels, r, j, d_out, y, lanes)
                    store(weights, r * lanes, odd)  # `weights` is free
                    strange = strange + odd
                if total(strange) != 0:
                    for r in range(count):
                        if total(load(weights, r * lanes)) != 0:
                            poisoned = True  # this row and all later ones see a number that is not finite
                            count = r
                            break
                rows_to_lanes(rows_at(lined, d_in), block, d, mask, False, keys, space)
                append_squares(keys, d, half_scale, space)
                whole = padded(count, TILE_ROWS)
                if count == 0:
                    break

                exponents(keys, turned, d, height, k_factor, phi, x, space)
                hide(x, keys, m, count, shifted(mask, row), has_mask, phi, space)
                empty = choose_reference(shift, x, m, stride, space, reference, opposite)
                if f.shifts != 0:
                    copy(shift, m, shifted(pointer(f.shifts, zero), row // block * m))
                rows_of_q = rows_at(q, q_row)
                query_exponents(rows_of_q, q_as, row, count, queries, reference, phi_rows, scratch, lanes, phi)
                query_features(phi_rows, count, State(reference, k_sum), width, lanes, phi, seen, highest, weights)

                # meanwhile the rows of the next block are asked for
                then, there = row + block, max(0, min(block, n - row - block))
                next_keys = Asked(*asked_rows(k, k_as, then * k_row, k_row), there, d)
                next_values = Asked(*asked_rows(v, v_as, then * v_row, v_row), there, d_v)
                largest_exponents(x, opposite, m, top, space, next_keys)
                features(x, above, opposite, top, m, phi, phi_k, space, next_values)
                product(phi_rows, whole, phi_k, m, weights, space)
                scale_rows(top, empty, lowest, zero, half, one, peaks, pivots, divisors, grown, faded, space)
                weigh(weights, count, top, later, pivots, grown, far, huge, result, from_state, space)
                for r in range(0, block, lanes):
                    # -largest(-smallest) is the minimum over the keys that the row sees
                    store(least, r, -maxima(result, r * lanes))
                    sum_of_weights = totals(from_state, r * lanes) + load(faded, r) * load(seen, r)
                    store(row_sums, r, sum_of_weights)
                    inverse = (zeros(rows) + one) / sum_of_weights
                    store(seen, r, replace_where_zero(sum_of_weights, inverse, sum_of_weights))
                for r in range(count):
                    if least[r] < least_product or (peaks[r] > most_above and not empty):
                        lost = True
                        count = r
                        break
                if f.level != 0:
                    for r in range(count):
                        found = row_sums[r]
                        level[row + r] = highest[r] + divisors[r] + math.log(found) if found != 0 else -lowest
                multiply(pairs, whole, value_panels, count, d_out, lanes, zero_row, products)
                multiply(phi_rows, whole, numerator, m, d_out, lanes, zero_row, earlier)
                for r in range(count):
                    faded_row, inverse = spread(faded, r), spread(seen, r)
                    for j in range(0, d_v, lanes):
                        value = load(result, r * d_out + j) + faded_row * load(from_state, r * d_out + j)
                        store_stored_part(out, out_as, (row + r) * d_v + j, value * inverse, d_v - j, lanes, edge)
                row += count
                if poisoned or lost or (row == n and f.keeps == 0):
                    break

                # the state after the block; `phi_k` is free
                shift_on(x, m, stride, lowest, shift, opposite, reference, phi_k, space)
                add_features(x, above, m, stride, phi, opposite, reference, k_sum, phi_k, space)
                multiply(rows_at(x, block), height, value_panels, count, d_out, lanes, zero_row, part_rows)
                for i in range(m):
                    fade = spread(reference, i)
                    for j in range(0, d_out, lanes):
                        place = place_in(numerator, i, j, d_out, lanes)
                        store(kv, place, load(kv, place) * fade + load(part, i * d_out + j))
            undone = row if lost else n
            if poisoned and not lost:
                undone = n + 1
            pointer(f.undone, np.int64(0))[0] = undone
            if f.keeps != 0:
                copy(shift, m, pointer(f.new_shift, zero))
                copy(k_sum, m, pointer(f.new_k_sum, zero))
                new_kv = pointer(f.new_kv, zero)
                for i in range(m):
                    for j in range(d_v):
                        new_kv[i * d_v + j] = kv[place_in(numerator, i, j, d_out, lanes)]
            for i in range(row * d_v, n * d_v):
                put_number(out, out_as, i, nothing_known)
        return DONE

    return step
