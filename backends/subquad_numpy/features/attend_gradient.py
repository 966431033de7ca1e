"""The gradient of attention through exponential features by queries and by the state (S, s), fused.

    G = g / D,  e = −(g · out) / D
    dy = φ_q ∘ (G Sᵀ + e sᵀ),  dS = Σ_i φ_q[i] G[i]ᵀ,  ds = Σ_i φ_q[i] e[i],  dq = dy Wᵀ

For φ_q = elu(y) + 1, dy = φ_q / (1 + max(y, 0)) ∘ (…) and dq = factor dy. g is the gradient by out; the other letters
are those of `blocks`. The gradient by W is written as its transpose, Σ_i dy[i] q[i]ᵀ, (m, d). Sums over rows are
written for each chunk of rows.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import copy, cut, load, pointer, room, shifted, spread, store, total, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_part, store_part
from subquad_numpy.codegen.matmul import TILE_ROWS, Matrix, Panels, into_panels, multiply, pack, padded, rows_at, turned
from subquad_numpy.features.blocks import (
    HEAD,
    OF_QUERIES,
    Scratch,
    Side,
    State,
    add_product,
    directions_of,
    load_center,
    load_start,
    query_exponents,
    query_features,
    sizes_of,
    store_rows,
    widths_of,
)
from subquad_numpy.features.phi import ELU, MAPS, slope_of
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.runtime.stored import AS_COMPUTED

ROWS = 8 * TILE_ROWS  # rows of a block

ATTEND_GRADIENT_RECORD = fields(
    HEAD,
    OF_QUERIES,
    {"out_row": None, "out": 2, "grad_row": None, "grad": 2},
    # Contiguous. All but grad_q point to the first chunk's sums; those of the next chunk follow `chunk_step` features
    # later.
    {"grad_q": 2, "grad_kv": 2, "grad_sum": 2, "grad_W": 2, "chunk_step": None},
)


@cache
def attend_gradient_kernel(dtype: np.dtype[Any], phi_name: str) -> Any:
    """Compile the gradient by queries; among the tasks of an item the chunk varies fastest."""
    lanes, kind, zero = element(dtype)
    one = dtype.type(1)
    phi = MAPS[phi_name].number

    @compiled(f"gradient of attend {dtype} {phi_name}", ATTEND_GRADIENT_RECORD)
    def differentiate(first: int, last: int, frames: Any) -> int:
        f = frames[0]
        n, d, m, d_v, chunks, chunk = sizes_of(f)
        has_W = f.grad_W != 0
        depth = d_v + 1  # the last number of G is e
        width, height, stride, d_in, d_out = widths_of(m, d, d_v, lanes)
        widest = max(stride, d_in, d_out)
        sizes = (
            *(lanes, ROWS, ROWS, stride, stride, stride, widest, d_in, d * width, m * d_in, depth * width),
            *(stride * d_out, stride * d_in, stride * max(d_in, d_out), ROWS * stride, ROWS * stride, ROWS * d_in),
            *(ROWS * d_in, ROWS * d_out, ROWS * d, ROWS * depth),
        )
        buffer = np.empty(room(sizes), kind)
        (
            edge, seen, level, start, k_sum, by_sum, nothing, center, packed, packed_turned, kv_packed,
            by_kv, by_W, part, y, by_y, result, block, weighted, rows, weights,
        ) = cut(buffer, sizes)  # fmt: skip
        clear(nothing, widest)
        clear(center, d_in)
        clear(y, ROWS * stride)
        clear(by_y, ROWS * stride)
        phi_q, by_phi, product = rows_at(y, stride), rows_at(by_y, stride), rows_at(result, d_in)
        directions, directions_turned, kv_turned = Panels(packed, d), Panels(packed_turned, m), Panels(kv_packed, depth)
        kv_gradient, W_gradient = rows_at(by_kv, d_out), rows_at(by_W, d_in)
        q_panels, g_panels = Panels(block, ROWS), Panels(weighted, ROWS)
        state, scratch, zero_row = State(start, k_sum), Scratch(rows, nothing, edge), rows_at(nothing, 0)

        packed_for = -1  # the item whose directions and state are in scratch: often that of the task before
        for task in range(first, last):
            item = task // chunks
            f = frames[item]
            q, numbers, out = pointer(f.x, zero), pointer(f.numbers, zero), pointer(f.out, zero)
            grad, grad_q = pointer(f.grad, zero), pointer(f.grad_q, zero)
            q_row, out_row, grad_row = f.x_row, f.out_row, f.grad_row
            if packed_for != item:
                packed_for = item
                load_center(f, d, lanes, center, zero)
                W = directions_of(f, zero)
                if phi != ELU:
                    pack(W, d, m, numbers[0], lanes, directions)
                    pack(turned(W), m, d, numbers[0], lanes, directions_turned)
                pack(Matrix(pointer(f.kv, zero), 1, f.kv_row), d_v, m, 1, lanes, kv_turned)
                load_start(f, m, width, zero, start, k_sum, lanes)
                for i in range(0, width, lanes):
                    into_panels(kv_turned, d_v, i, width, load(k_sum, i), lanes)
            queries = Side(d, center, numbers, directions, width)
            is_whole = phi != ELU and f.center == 0 and d == d_in
            clear(by_kv, stride * d_out)
            clear(by_W, stride * d_in)
            clear(by_sum, stride)

            stop = min(n, (task % chunks + 1) * chunk)
            for row in range(task % chunks * chunk, stop, ROWS):
                count = min(ROWS, stop - row)
                whole = padded(count, TILE_ROWS)
                # rows in whole tiles and vectors are read where they lie, and their gradients written where they belong
                fits = is_whole and count == whole
                here, step = rows, d
                if fits:
                    here, step = shifted(q, row * q_row), q_row
                    multiply(rows_at(here, step), whole, directions, d, width, lanes, rows_at(start, 0), phi_q)
                else:
                    query_exponents(
                        rows_at(q, q_row), AS_COMPUTED, row, count, queries, start, phi_q, scratch, lanes, phi
                    )  # fmt: skip
                query_features(phi_q, count, state, width, lanes, phi, seen, level, result)
                for r in range(count):
                    if has_W:
                        for p in range(0, d, lanes):
                            x = load_part(here, r * step + p, d - p, lanes, edge)
                            into_panels(q_panels, r, p, d_in, x, lanes)
                    inverse = one / seen[r] if seen[r] != 0 else zero
                    along = zeros(rows)
                    for j in range(0, d_v, lanes):
                        g = load_part(grad, (row + r) * grad_row + j, d_v - j, lanes, edge) * inverse
                        along = along + g * load_part(out, (row + r) * out_row + j, d_v - j, lanes, edge)
                        into_panels(g_panels, r, j, d_out, g, lanes)
                        store_part(weights, r * depth + j, g, d_v - j, lanes, edge)
                    weights[r * depth + d_v] = -total(along)
                for i in range(count * depth, whole * depth):
                    weights[i] = 0
                multiply(rows_at(weights, depth), whole, kv_turned, depth, width, lanes, zero_row, by_phi)
                for r in range(count):
                    e = spread(weights, r * depth + d_v)
                    for i in range(0, width, lanes):
                        slope = load(y, r * stride + i)
                        store(by_sum, i, load(by_sum, i) + slope * e)
                        if phi == ELU:
                            x = load_part(q, (row + r) * q_row + i, d - i, lanes, edge) * numbers[0]
                            slope = slope_of(slope, x, phi) * numbers[0]
                        store(by_y, r * stride + i, load(by_y, r * stride + i) * slope)
                add_product(turned(phi_q), height, g_panels, count, kv_gradient, part, nothing, lanes)
                if phi == ELU:
                    store_rows(shifted(grad_q, row * d), count, d, by_phi, lanes, edge)
                elif fits:
                    target = rows_at(shifted(grad_q, row * d), d)
                    multiply(by_phi, whole, directions_turned, m, d_in, lanes, zero_row, target)
                else:
                    multiply(by_phi, whole, directions_turned, m, d_in, lanes, zero_row, product)
                    store_rows(shifted(grad_q, row * d), count, d, product, lanes, edge)
                if has_W:
                    add_product(turned(by_phi), height, q_panels, count, W_gradient, part, nothing, lanes)

            place = task % chunks * f.chunk_step
            copy(by_sum, m, shifted(pointer(f.grad_sum, zero), place))
            store_rows(shifted(pointer(f.grad_kv, zero), place * d_v), m, d_v, kv_gradient, lanes, edge)
            if has_W:
                store_rows(shifted(pointer(f.grad_W, zero), place * d), m, d, W_gradient, lanes, edge)
        return DONE

    return differentiate
