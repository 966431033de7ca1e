"""One row after a state, in attention through features: a token of decoding, in one pass over the state.

    S ← exp(shift − shift') S + φ_k vᵀ,    out = φ_qᵀ S / φ_qᵀ s

in the letters of `blocks`. The new shift is the maximum of the old one and of the key's exponents, so the sum of a
feature is at least the largest of its terms, and nothing that counts can underflow: other than blocks of rows in
`step`, one row needs no further care.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import (
    at_least,
    copy,
    cut,
    inline,
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
from subquad_numpy.codegen.copies import clear, load_part, store_part
from subquad_numpy.codegen.matmul import TILE_ROWS, Matrix, Panels, pack, rows_at
from subquad_numpy.codegen.side_by_side import exp_negative
from subquad_numpy.codegen.stored import load_stored_part, store_stored_part, stored_as
from subquad_numpy.codegen.vector_math import LEAST
from subquad_numpy.features.blocks import (
    KEYS,
    OUTPUT,
    QUERIES,
    VALUES,
    State,
    directions_of,
    query_features,
    widths_of,
)
from subquad_numpy.features.few_rows import BESIDE, multiply_few
from subquad_numpy.features.phi import ELU, MAPS, log_of, times_value
from subquad_numpy.features.step import STEP_RECORD

AT_ONCE = 12  # items whose exponents are one product: with queries and keys, whole tiles of 6 or 8 rows


@inline
def _centred(source: Any, stored: int, center: Any, has_center: bool, d: int, lanes: int, row: Any, edge: Any) -> Any:
    """Write a row less its center into `row`; returns 0 in all lanes if its numbers are finite, else NaN in some."""
    for p in range(0, d, lanes):
        store(row, p, load_stored_part(source, stored, p, d - p, lanes, edge))
    odd = zeros(row)
    for p in range(0, d, lanes):
        odd = odd + (load(row, p) - load(row, p))
    if has_center:
        for p in range(d):
            row[p] -= center[p]
    return odd


@inline
def _load_row(source: Any, is_given: bool, m: int, width: int, lanes: int, otherwise: Any, target: Any) -> None:
    """Copy a row of m numbers; those after them, or all where no row is given, are `otherwise`."""
    whole = m // lanes * lanes if is_given else 0
    for i in range(0, whole, lanes):
        store(target, i, load(source, i))
    for i in range(whole, width):
        target[i] = source[i] if is_given and i < m else otherwise


@inline
def _alike(frames: Any, begin: int, stop: int) -> int:
    """How many items from `begin` on, and before `stop`, have one pair of directions."""
    W, q_W, count = frames[begin].W, frames[begin].q_W, 1
    while begin + count < stop and frames[begin + count].W == W and frames[begin + count].q_W == q_W:
        count += 1
    return count


@inline
def _is_shown(f: Any) -> bool:
    """Whether the mask of an item shows its key."""
    return f.mask == 0 or pointer(f.mask, np.uint8(0))[0] != 0


@cache
def token_kernel(dtype: np.dtype[Any], phi_name: str) -> Any:
    """Compile the step of one row, with the records of `step`; a task is one item."""
    lanes, kind, zero = element(dtype)
    phi = MAPS[phi_name].number
    lowest = dtype.type(-np.inf)
    side = BESIDE * lanes
    most = 1 if phi == ELU else AT_ONCE

    @compiled(f"token {dtype} {phi_name}", STEP_RECORD)
    def token(first: int, last: int, frames: Any) -> int:
        f = frames[0]
        d, m, d_v = f.d, f.m, f.d_v
        k_as, v_as = stored_as(f.stored, KEYS), stored_as(f.stored, VALUES)
        q_as, out_as = stored_as(f.stored, QUERIES), stored_as(f.stored, OUTPUT)
        width, _, _, d_in, d_out = widths_of(m, d, d_v, lanes)
        whole = d_v // side * side
        is_shared = f.q_W == f.W and f.q_W_row == f.W_row and f.q_W_column == f.W_column
        packed = 0 if phi == ELU else d * width
        packed_q = 0 if is_shared else packed  # queries may have directions of their own
        rooms = 2 * most + TILE_ROWS  # rows of queries, then of keys, and the last of a tile
        sizes = (
            *(lanes, width, width, width, width, lanes, lanes, d_out, d_out, d_out, max(width, d_out), packed),
            *(packed_q, rooms * d_in, most * lanes, rooms * width),
        )
        buffer = np.empty(room(sizes), kind)
        (
            edge, shift, start, fade, k_sum, seen, level, value, result, unkept, nothing, packed_W,
            packed_U, rows, odds, exponents,
        ) = cut(buffer, sizes)  # fmt: skip
        clear(nothing, max(width, d_out))
        directions = Panels(packed_W, d)
        q_directions = directions if is_shared else Panels(packed_U, d)
        known_W = known_U = -1  # the directions that are in scratch: often those of the items before
        begin, count = first, 0
        for item in range(first, last):
            if item == begin + count:  # the exponents of several items are one product
                begin = item
                count = _alike(frames, begin, min(last, begin + most))
                f = frames[begin]
                numbers, q_numbers = pointer(f.numbers, zero), pointer(f.q_numbers, zero)
                for r in range(count):
                    f, row = frames[begin + r], shifted(rows, r * d_in)
                    _centred(
                        pointer(f.q_x, zero), q_as, pointer(f.q_center, zero), f.q_center != 0, d, lanes, row, edge
                    )
                    row = shifted(rows, (count + r) * d_in)
                    odd = zeros(edge)
                    if _is_shown(f):
                        odd = _centred(
                            pointer(f.x, zero), k_as, pointer(f.center, zero), f.center != 0, d, lanes, row, edge
                        )
                    else:
                        clear(row, d_in)
                    store(odds, r * lanes, odd)
                if phi == ELU:
                    for i in range(0, width, lanes):
                        store(exponents, i, load(rows, i) * q_numbers[0])
                        store(exponents, width + i, load(rows, d_in + i) * numbers[0])
                else:
                    if known_W != f.W or known_U != f.q_W:
                        known_W, known_U = f.W, f.q_W
                        pack(directions_of(f, zero), d, m, numbers[0], lanes, directions)
                        if not is_shared:
                            U = Matrix(pointer(f.q_W, zero), f.q_W_row, f.q_W_column)
                            pack(U, d, m, q_numbers[0], lanes, q_directions)
                    height, y = 2 * count if is_shared else count, exponents
                    multiply_few(rows, d_in, height, q_directions, d, width, lanes, nothing, y)
                    if not is_shared:
                        keys, y = shifted(rows, count * d_in), shifted(exponents, count * width)
                        multiply_few(keys, d_in, count, directions, d, width, lanes, nothing, y)

            f, place = frames[item], item - begin
            numbers = pointer(f.numbers, zero)
            y, x = shifted(exponents, place * width), shifted(exponents, (count + place) * width)
            k_row = shifted(rows, (count + place) * d_in)
            has_state, keeps = f.shift != 0, f.keeps != 0
            _load_row(pointer(f.shift, zero), has_state, m, width, lanes, lowest, shift)
            _load_row(pointer(f.k_sum, zero), has_state, m, width, lanes, zero, k_sum)
            undone = pointer(f.undone, np.int64(0))
            undone[0] = 1
            if _is_shown(f):
                odd = load(odds, place * lanes)
                for j in range(0, d_v, lanes):
                    store(value, j, load_stored_part(pointer(f.v, zero), v_as, j, d_v - j, lanes, edge))
                    odd = odd + (load(value, j) - load(value, j))
                if total(odd) != 0:  # the generic form says how far a number that is not finite reaches
                    undone[0] = 0
                    continue
                if phi != ELU and numbers[1] != 0:
                    square = zeros(k_row)
                    for p in range(0, d, lanes):
                        square = square + load(k_row, p) * load(k_row, p)
                    less = numbers[1] * total(square)
                    for i in range(0, width, lanes):
                        store(x, i, load(x, i) - less)
                for i in range(0, width, lanes):
                    part, old = load(x, i), load(shift, i)
                    new = at_least(log_of(part, phi), old)
                    finite = at_least(new, LEAST(new))
                    gone, e = exp_negative((old - finite, log_of(part, phi) - finite))
                    e = times_value(e, part, phi)
                    store(fade, i, gone)
                    store(k_sum, i, load(k_sum, i) * gone + e)
                    store(x, i, e)
                    store(shift, i, new)
            else:
                clear(x, width)
                clear(value, d_out)
                for i in range(width):
                    fade[i] = 1
            for i in range(m, width):  # features that fill up the last vector count for nothing
                k_sum[i] = 0
                shift[i] = lowest

            for i in range(0, width, lanes):  # a shift of −∞ counts as 0
                known = load(shift, i)
                known = where_negative(known - LEAST(known), zeros(shift), known)
                store(start, i, known)
                if phi != ELU:
                    store(y, i, load(y, i) + known)
            for i in range(m, width):
                start[i] = lowest
                if phi != ELU:
                    y[i] = lowest
            query_features(rows_at(y, width), 1, State(start, k_sum), width, lanes, phi, seen, level, edge)
            divisor = zeros(edge) + (seen[0] if seen[0] != 0 else zero + 1)  # a row that sees no key is 0

            if keeps:
                copy(shift, m, pointer(f.new_shift, zero))
                copy(k_sum, m, pointer(f.new_k_sum, zero))
            kv, kv_row, new_kv, new_row = nothing, 0, unkept, 0
            if has_state:
                kv, kv_row = pointer(f.kv, zero), d_v
            if keeps:
                new_kv, new_row = pointer(f.new_kv, zero), d_v
            for j in range(0, whole, side):
                v_0, v_1, v_2, v_3 = (load(value, j), load(value, j + lanes), load(value, j + 2 * lanes),
                                      load(value, j + 3 * lanes))  # fmt: skip
                sum_0, sum_1, sum_2, sum_3 = zeros(edge), zeros(edge), zeros(edge), zeros(edge)
                for i in range(m):
                    e, gone, weight = spread(x, i), spread(fade, i), spread(y, i)
                    old, new = shifted(kv, i * kv_row + j), shifted(new_kv, i * new_row + j)
                    a = e * v_0 + load(old, 0) * gone
                    store(new, 0, a)
                    sum_0 = sum_0 + weight * a
                    a = e * v_1 + load(old, lanes) * gone
                    store(new, lanes, a)
                    sum_1 = sum_1 + weight * a
                    a = e * v_2 + load(old, 2 * lanes) * gone
                    store(new, 2 * lanes, a)
                    sum_2 = sum_2 + weight * a
                    a = e * v_3 + load(old, 3 * lanes) * gone
                    store(new, 3 * lanes, a)
                    sum_3 = sum_3 + weight * a
                store(result, j, sum_0)
                store(result, j + lanes, sum_1)
                store(result, j + 2 * lanes, sum_2)
                store(result, j + 3 * lanes, sum_3)
            for j in range(whole, d_v, lanes):
                along, part = zeros(edge), load(value, j)
                for i in range(m):
                    old = load_part(kv, i * kv_row + j, d_v - j, lanes, edge)
                    a = spread(x, i) * part + old * spread(fade, i)
                    store_part(new_kv, i * new_row + j, a, d_v - j, lanes, edge)
                    along = along + spread(y, i) * a
                store(result, j, along)
            out = pointer(f.out, zero)
            for j in range(0, d_v, lanes):
                store_stored_part(out, out_as, j, load(result, j) / divisor, d_v - j, lanes, edge)
        return DONE

    return token
