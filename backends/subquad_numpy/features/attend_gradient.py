"""The gradient of attention through exponential features by the queries, and by what the keys left (S, s).

    G = g / D,  e = −(g · out) / D
    dy = φ_q ∘ (G Sᵀ + e sᵀ),  dS = Σ_i φ_q[i] G[i]ᵀ,  ds = Σ_i φ_q[i] e[i],  dq = dy Wᵀ

or dy = φ_q / (1 + max(y, 0)) ∘ (…), dq = factor dy where φ_q = elu(y) + 1. g is the gradient by out; the other letters
are those of `blocks`. The directions' own gradient comes turned: Σ_i dy[i] q[i]ᵀ, (m, d). Sums over rows are
those of one chunk of them.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray

from subquad_numpy.codegen import at_least, cut, lanes_of, load, pointer, room, shifted, spread, store, total, zeros
from subquad_numpy.codegen.compile import DONE, compiled
from subquad_numpy.codegen.copies import clear, copy, load_part, store_part
from subquad_numpy.codegen.matmul import TILE_ROWS, multiply, pack, padded
from subquad_numpy.codegen.vector_math import ZERO
from subquad_numpy.features.blocks import (
    HEAD,
    OF_QUERIES,
    add_product,
    into_panels,
    load_center,
    load_start,
    query_exponents,
    query_features,
    sizes_of,
    store_rows,
    widths_of,
)
from subquad_numpy.runtime.arguments import fields

ROWS = 8 * TILE_ROWS  # of a block

ATTEND_GRADIENT_RECORD = fields(
    HEAD,
    OF_QUERIES,
    {"out_row": None, "out": 2, "grad_row": None, "grad": 2},
    # contiguous; the first chunk's sums, and features from them to those of the next
    {"grad_q": 2, "grad_kv": 2, "grad_sum": 2, "grad_W": 2, "chunk_step": None},
)


@cache
def attend_gradient_kernel(dtype: np.dtype[Any], elu: bool) -> Any:
    """Compile `differentiate(first, last, frames)` for queries; the chunk varies fastest."""
    lanes = lanes_of(dtype)
    kind = numba.from_dtype(dtype)
    zero, one = dtype.type(0), dtype.type(1)

    @compiled(f"gradient by queries {dtype}{' elu' * elu}", ATTEND_GRADIENT_RECORD)
    def differentiate(first: int, last: int, frames: Any) -> int:
        f = carray(frames, last)[0]
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
            edge, seen, level, start, k_sum, by_sum, nothing, center, packed, turned, turned_kv,
            by_kv, by_W, part, phi, by_phi, result, panels, weighted, rows, weights,
        ) = cut(buffer, sizes)  # fmt: skip
        clear(nothing, widest)
        clear(center, d_in)
        clear(phi, ROWS * stride)
        clear(by_phi, ROWS * stride)

        packed_for = -1
        for task in range(first, last):
            item = task // chunks
            f = carray(frames, last)[item]
            q, numbers, out = pointer(f.x, zero), pointer(f.numbers, zero), pointer(f.out, zero)
            grad, grad_q = pointer(f.grad, zero), pointer(f.grad_q, zero)
            q_row, out_row, grad_row = f.x_row, f.out_row, f.grad_row
            if packed_for != item:
                packed_for = item
                load_center(f, d, lanes, center, zero)
                W = pointer(f.W, zero)
                if not elu:
                    pack(W, f.W_row, f.W_column, d, m, numbers[0], lanes, packed, d)
                    pack(W, f.W_column, f.W_row, m, d, numbers[0], lanes, turned, m)
                pack(pointer(f.kv, zero), 1, f.kv_row, d_v, m, 1, lanes, turned_kv, depth)
                load_start(f, m, width, zero, start, k_sum)
                for i in range(0, width, lanes):
                    into_panels(turned_kv, depth, d_v, i, width, load(k_sum, i), lanes)
            clear(by_kv, stride * d_out)
            clear(by_W, stride * d_in)
            clear(by_sum, stride)

            stop = min(n, (task % chunks + 1) * chunk)
            for row in range(task % chunks * chunk, stop, ROWS):
                count = min(ROWS, stop - row)
                whole = padded(count, TILE_ROWS)
                query_exponents(
                    shifted(q, row * q_row), q_row, count, d, center, numbers, packed, start,
                    width, lanes, edge, elu, rows, phi, stride,
                )  # fmt: skip
                query_features(phi, stride, count, start, k_sum, width, lanes, elu, seen, level)
                for r in range(count):
                    if has_W:
                        for p in range(0, d, lanes):
                            x = load_part(rows, r * d + p, d - p, lanes, edge)
                            into_panels(panels, ROWS, r, p, d_in, x, lanes)
                    inverse = one / seen[r] if seen[r] != 0 else zero
                    along = zeros(rows)
                    for j in range(0, d_v, lanes):
                        g = load_part(grad, (row + r) * grad_row + j, d_v - j, lanes, edge) * inverse
                        along = along + g * load_part(out, (row + r) * out_row + j, d_v - j, lanes, edge)
                        into_panels(weighted, ROWS, r, j, d_out, g, lanes)
                        store_part(weights, r * depth + j, g, d_v - j, lanes, edge)
                    weights[r * depth + d_v] = -total(along)
                for i in range(count * depth, whole * depth):
                    weights[i] = 0
                multiply(
                    weights, depth, 1, whole, turned_kv, depth, depth, width, lanes, nothing, 0, by_phi, stride
                )  # fmt: skip
                for r in range(count):
                    e = spread(weights, r * depth + d_v)
                    for i in range(0, width, lanes):
                        slope = load(phi, r * stride + i)
                        store(by_sum, i, load(by_sum, i) + slope * e)
                        if elu:
                            y = load_part(q, (row + r) * q_row + i, d - i, lanes, edge) * numbers[0]
                            slope = slope / (at_least(y, ZERO(y)) + 1.0) * numbers[0]
                        store(by_phi, r * stride + i, load(by_phi, r * stride + i) * slope)
                add_product(phi, stride, height, weighted, ROWS, count, d_out, lanes, nothing, part, by_kv)
                if elu:
                    store_rows(grad_q, row * d, count, d, by_phi, stride, lanes, edge)
                else:
                    multiply(by_phi, stride, 1, whole, turned, m, m, d_in, lanes, nothing, 0, result, d_in)
                    store_rows(grad_q, row * d, count, d, result, d_in, lanes, edge)
                if has_W:
                    add_product(by_phi, stride, height, panels, ROWS, count, d_in, lanes, nothing, part, by_W)

            place = task % chunks * f.chunk_step
            copy(by_sum, m, shifted(pointer(f.grad_sum, zero), place))
            store_rows(pointer(f.grad_kv, zero), place * d_v, m, d_v, by_kv, d_out, lanes, edge)
            if has_W:
                store_rows(pointer(f.grad_W, zero), place * d, m, d, by_W, d_in, lanes, edge)
        buffer[0] = 0  # see `cut`
        return DONE

    return differentiate
