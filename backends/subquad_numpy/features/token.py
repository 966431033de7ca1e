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
    zeros,
)
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_part, store_part, turn
from subquad_numpy.codegen.matmul import Matrix, rows_at
from subquad_numpy.codegen.stored import load_stored_part, store_stored_part, stored_as
from subquad_numpy.codegen.vector_math import LEAST, exp_negative
from subquad_numpy.features.blocks import KEYS, OUTPUT, QUERIES, VALUES, State, query_features, widths_of
from subquad_numpy.features.phi import ELU, MAPS, log_of, times_value
from subquad_numpy.features.step import STEP_RECORD

BESIDE = 4  # vectors of a row of the numerator that are read side by side


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
def _load_directions(W: Any, d: int, m: int, width: int, factor: Any, lanes: int, target: Any) -> None:
    """Write factor W as (d, width), with zeros from column m on."""
    whole, tiles = m // lanes * lanes, d // lanes * lanes
    if W.row != 1:  # columns that lie side by side are turned in tiles
        tiles = 0
    for i in range(0, whole, lanes):
        for p in range(0, tiles, lanes):
            source, place = shifted(W.data, i * W.column + p), shifted(target, p * width + i)
            turn(source, source, W.column, place, place, width)
    for p in range(d):
        begin = whole if p < tiles else 0
        for i in range(begin, width):
            target[p * width + i] = W.data[p * W.row + i * W.column] if i < m else 0
    for i in range(0, d * width, lanes):
        store(target, i, load(target, i) * factor)


@inline
def _exponents(row: Any, W: Any, d: int, width: int, lanes: int, y: Any) -> None:
    """Write y = row W, for W of (d, width)."""
    side = BESIDE * lanes
    whole = width // side * side
    for i in range(0, whole, side):
        sum_0, sum_1, sum_2, sum_3 = zeros(row), zeros(row), zeros(row), zeros(row)
        for p in range(d):
            x, part = spread(row, p), shifted(W, p * width + i)
            sum_0 = sum_0 + x * load(part, 0)
            sum_1 = sum_1 + x * load(part, lanes)
            sum_2 = sum_2 + x * load(part, 2 * lanes)
            sum_3 = sum_3 + x * load(part, 3 * lanes)
        store(y, i, sum_0)
        store(y, i + lanes, sum_1)
        store(y, i + 2 * lanes, sum_2)
        store(y, i + 3 * lanes, sum_3)
    for i in range(whole, width, lanes):
        along = zeros(row)
        for p in range(d):
            along = along + spread(row, p) * load(W, p * width + i)
        store(y, i, along)


@cache
def token_kernel(dtype: np.dtype[Any], phi_name: str) -> Any:
    """Compile the step of one row, with the records of `step`; a task is one item."""
    lanes, kind, zero = element(dtype)
    phi = MAPS[phi_name].number
    lowest = dtype.type(-np.inf)
    side = BESIDE * lanes

    @compiled(f"token {dtype} {phi_name}", STEP_RECORD)
    def token(first: int, last: int, frames: Any) -> int:
        f = frames[0]
        d, m, d_v = f.d, f.m, f.d_v
        k_as, v_as = stored_as(f.stored, KEYS), stored_as(f.stored, VALUES)
        q_as, out_as = stored_as(f.stored, QUERIES), stored_as(f.stored, OUTPUT)
        width, _, _, d_in, d_out = widths_of(m, d, d_v, lanes)
        is_shared = f.q_W == f.W and f.q_W_row == f.W_row and f.q_W_column == f.W_column
        copies = 1 if is_shared else 2  # queries may have directions of their own
        packed = 0 if phi == ELU else d * width
        sizes = (
            *(lanes, width, width, width, width, width, width, lanes, lanes, d_in, d_in, d_out, d_out),
            copies * packed,
        )
        buffer = np.empty(room(sizes), kind)
        edge, x, y, shift, start, fade, k_sum, seen, level, q_row, k_row, value, result, directions = cut(buffer, sizes)
        q_directions = shifted(directions, (copies - 1) * packed)
        packed_W = packed_q_W = -1  # which directions lie in scratch: often those of the item before
        for item in range(first, last):
            f = frames[item]
            numbers, q_numbers = pointer(f.numbers, zero), pointer(f.q_numbers, zero)
            kv, new_kv = pointer(f.kv, zero), pointer(f.new_kv, zero)
            shifts, sums = pointer(f.shift, zero), pointer(f.k_sum, zero)
            has_state, keeps = f.shift != 0, f.keeps != 0
            is_shown = f.mask == 0 or pointer(f.mask, np.uint8(0))[0] != 0
            for i in range(width):
                shift[i] = shifts[i] if has_state and i < m else lowest
                k_sum[i] = sums[i] if has_state and i < m else 0

            if phi != ELU and (packed_W != f.W or packed_q_W != f.q_W):
                packed_W, packed_q_W = f.W, f.q_W
                W = Matrix(pointer(f.W, zero), f.W_row, f.W_column)
                _load_directions(W, d, m, width, numbers[0], lanes, directions)
                if copies == 2:
                    U = Matrix(pointer(f.q_W, zero), f.q_W_row, f.q_W_column)
                    _load_directions(U, d, m, width, q_numbers[0], lanes, q_directions)
            _centred(pointer(f.q_x, zero), q_as, pointer(f.q_center, zero), f.q_center != 0, d, lanes, q_row, edge)
            if phi == ELU:
                for i in range(0, width, lanes):
                    store(y, i, load(q_row, i) * q_numbers[0])
            else:
                _exponents(q_row, q_directions, d, width, lanes, y)
            undone = pointer(f.undone, np.int64(0))
            undone[0] = 1
            if is_shown:
                odd = _centred(pointer(f.x, zero), k_as, pointer(f.center, zero), f.center != 0, d, lanes, k_row, edge)
                for j in range(0, d_v, lanes):
                    store(value, j, load_stored_part(pointer(f.v, zero), v_as, j, d_v - j, lanes, edge))
                    odd = odd + (load(value, j) - load(value, j))
                if total(odd) != 0:  # the generic form says how far a number that is not finite reaches
                    undone[0] = 0
                    continue
                if phi == ELU:
                    for i in range(0, width, lanes):
                        store(x, i, load(k_row, i) * numbers[0])
                else:
                    _exponents(k_row, directions, d, width, lanes, x)
                if phi != ELU and numbers[1] != 0:
                    square = zeros(k_row)
                    for p in range(0, d, lanes):
                        square = square + load(k_row, p) * load(k_row, p)
                    less = numbers[1] * total(square)
                    for i in range(m):
                        x[i] -= less
                for i in range(0, width, lanes):
                    part, old = load(x, i), load(shift, i)
                    new = at_least(log_of(part, phi), old)
                    finite = at_least(new, LEAST(new))
                    gone = exp_negative(old - finite)
                    e = times_value(exp_negative(log_of(part, phi) - finite), part, phi)
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

            for i in range(width):
                start[i] = shift[i] if shift[i] != lowest or i >= m else 0
                if phi != ELU:
                    y[i] += start[i]
            query_features(rows_at(y, width), 1, State(start, k_sum), width, lanes, phi, seen, level, edge)
            divisor = zeros(edge) + (seen[0] if seen[0] != 0 else zero + 1)  # a row that sees no key is 0

            if keeps:
                copy(shift, m, pointer(f.new_shift, zero))
                copy(k_sum, m, pointer(f.new_k_sum, zero))
            whole = d_v // side * side
            for j in range(0, whole, side):
                v_0, v_1, v_2, v_3 = (load(value, j), load(value, j + lanes), load(value, j + 2 * lanes),
                                      load(value, j + 3 * lanes))  # fmt: skip
                sum_0, sum_1, sum_2, sum_3 = zeros(edge), zeros(edge), zeros(edge), zeros(edge)
                for i in range(m):
                    e, gone, weight = spread(x, i), spread(fade, i), spread(y, i)
                    a_0, a_1, a_2, a_3 = e * v_0, e * v_1, e * v_2, e * v_3
                    if has_state:
                        row = shifted(kv, i * d_v + j)
                        a_0 = a_0 + load(row, 0) * gone
                        a_1 = a_1 + load(row, lanes) * gone
                        a_2 = a_2 + load(row, 2 * lanes) * gone
                        a_3 = a_3 + load(row, 3 * lanes) * gone
                    if keeps:
                        row = shifted(new_kv, i * d_v + j)
                        store(row, 0, a_0)
                        store(row, lanes, a_1)
                        store(row, 2 * lanes, a_2)
                        store(row, 3 * lanes, a_3)
                    sum_0 = sum_0 + weight * a_0
                    sum_1 = sum_1 + weight * a_1
                    sum_2 = sum_2 + weight * a_2
                    sum_3 = sum_3 + weight * a_3
                store(result, j, sum_0)
                store(result, j + lanes, sum_1)
                store(result, j + 2 * lanes, sum_2)
                store(result, j + 3 * lanes, sum_3)
            for j in range(whole, d_v, lanes):
                along, part = zeros(edge), load(value, j)
                for i in range(m):
                    a = spread(x, i) * part
                    if has_state:
                        a = a + load_part(kv, i * d_v + j, d_v - j, lanes, edge) * spread(fade, i)
                    if keeps:
                        store_part(new_kv, i * d_v + j, a, d_v - j, lanes, edge)
                    along = along + spread(y, i) * a
                store(result, j, along)
            out = pointer(f.out, zero)
            for j in range(0, d_v, lanes):
                store_stored_part(out, out_as, j, load(result, j) / divisor, d_v - j, lanes, edge)
        return DONE

    return token
