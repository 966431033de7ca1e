"""The gradient of attention through exponential features by the queries, and by what the keys left (S, s).

    G = g / D,  e = −(g · out) / D
    dy = φ_q ∘ (G Sᵀ + e sᵀ),  dS = Σ_i φ_q[i] G[i]ᵀ,  ds = Σ_i φ_q[i] e[i],  dq = dy Wᵀ

or dy = φ_q / (1 + max(y, 0)) ∘ (…), dq = factor dy where φ_q = elu(y) + 1. g is the gradient by out; the other letters
are those of `_gradient_blocks`. The directions' own gradient comes turned: Σ_i dy[i] q[i]ᵀ, (m, d). Sums over rows are
those of one chunk of them.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray

from subquad_numpy._compile import DONE, compiled, fingerprint
from subquad_numpy._gradient_blocks import ROWS, add_product, into_panels, rows_out
from subquad_numpy._maps import log_after, times_value
from subquad_numpy._math import ZERO, exp_negative
from subquad_numpy._product import TILE_ROWS, multiply, pack, panel_at
from subquad_numpy._simd import (
    aligned,
    at_least,
    lanes_of,
    largest,
    load,
    pointer,
    shifted,
    spread,
    store,
    total,
    zeros,
)
from subquad_numpy._tile import clear, load_part, row_in, store_part

QUERY_FRAME = (
    # a task is `chunk` of n rows of an item; out_rows the features of all items: those of one chunk's sums
    *("n", "d", "m", "d_v", "chunks", "chunk", "out_rows"),
    # elements from row to row, of W also from column to column
    *("q_row", "W_row", "W_step", "kv_row", "out_row", "grad_row"),
    # addresses; start, k_sum: (…, m), or 0 for zeros and ones; numbers are (factor of W,); center: (…, d), or 0
    *("q", "W", "start", "kv", "k_sum", "out", "grad", "numbers", "center"),
    # table of int64: a row (q, W, start, kv, k_sum, out, grad, center) for each item: elements to its first
    "table",
    # (items, n, d); (chunks, out_rows, d_v), (chunks, out_rows), (chunks, out_rows, d) or 0
    *("grad_q", "grad_kv", "grad_sum", "grad_W"),
)


@cache
def query_gradient_kernel(dtype: np.dtype[Any], elu: bool) -> Any:
    """Compile `differentiate(first, last, frame)` for queries; the chunk varies fastest."""
    lanes = lanes_of(dtype)
    kind = numba.from_dtype(dtype)
    zero, one, lowest = dtype.type(0), dtype.type(1), dtype.type(-np.inf)
    stamp = fingerprint()

    @compiled(f"gradient by queries {dtype}{' elu' * elu}", QUERY_FRAME)
    def differentiate(first: int, last: int, frame: Any) -> int:
        stamp  # noqa: B018  part of the key of the cache on disk
        f = carray(frame, 1)[0]
        n, d, m, d_v, chunks, chunk, out_rows = f.n, f.d, f.m, f.d_v, f.chunks, f.chunk, f.out_rows
        q_row, W_row, W_step, kv_row, out_row, grad_row = f.q_row, f.W_row, f.W_step, f.kv_row, f.out_row, f.grad_row
        all_q, all_W, starts = pointer(f.q, zero), pointer(f.W, zero), pointer(f.start, zero)
        all_kv, sums, outs = pointer(f.kv, zero), pointer(f.k_sum, zero), pointer(f.out, zero)
        grads, numbers, centers = pointer(f.grad, zero), pointer(f.numbers, zero), pointer(f.center, zero)
        has_start, has_sum, has_center = f.start != 0, f.k_sum != 0, f.center != 0
        table = pointer(f.table, np.int64(0))
        grad_q, grad_kv, grad_sum = pointer(f.grad_q, zero), pointer(f.grad_kv, zero), pointer(f.grad_sum, zero)
        has_W, grad_W = f.grad_W != 0, pointer(f.grad_W, zero)

        width = -(-m // lanes) * lanes
        height = -(-width // TILE_ROWS) * TILE_ROWS
        stride = -(-height // lanes) * lanes  # of exponents, which are also read as the rows of whole tiles
        d_in, d_out, depth = -(-d // lanes) * lanes, -(-d_v // lanes) * lanes, d_v + 1
        widest = max(d_in, d_out)
        size = ROWS * (2 * stride + 2 * d_in + d_out + d + depth) + (d + depth) * width + m * d_in
        size += stride * (d_in + d_out + widest) + 3 * stride + max(stride, widest) + d_in
        buffer = np.empty(size + 2 * lanes, kind)
        edge = aligned(buffer)
        start = shifted(edge, lanes)
        k_sum = shifted(start, stride)
        by_sum = shifted(k_sum, stride)
        nothing = shifted(by_sum, stride)
        center = shifted(nothing, max(stride, widest))
        packed = shifted(center, d_in)
        turned = shifted(packed, d * width)
        turned_kv = shifted(turned, m * d_in)
        by_kv = shifted(turned_kv, depth * width)
        by_W = shifted(by_kv, stride * d_out)
        part = shifted(by_W, stride * d_in)
        exponents = shifted(part, stride * widest)
        by_phi = shifted(exponents, ROWS * stride)
        result = shifted(by_phi, ROWS * stride)
        panels = shifted(result, ROWS * d_in)
        weighted = shifted(panels, ROWS * d_in)
        rows = shifted(weighted, ROWS * d_out)
        weights = shifted(rows, ROWS * d)
        clear(nothing, max(stride, widest))
        clear(center, d_in)
        clear(exponents, 2 * ROWS * stride)

        packed_for = -1
        for task in range(first, last):
            item = task // chunks
            entry = item * 8
            q, out, grad = (
                shifted(all_q, table[entry]), shifted(outs, table[entry + 5]), shifted(grads, table[entry + 6])
            )  # fmt: skip
            if packed_for != item:
                packed_for = item
                if has_center:
                    row_in(centers, table[entry + 7], d, lanes, center)
                W, kv = shifted(all_W, table[entry + 1]), shifted(all_kv, table[entry + 3])
                if not elu:
                    pack(W, W_row, W_step, d, m, numbers[0], lanes, packed, d)
                    pack(W, W_step, W_row, m, d, numbers[0], lanes, turned, m)
                pack(kv, 1, kv_row, d_v, m, 1, lanes, turned_kv, depth)
                for i in range(width):
                    start[i] = lowest
                    k_sum[i] = 0
                    if i < m:
                        start[i] = starts[table[entry + 2] + i] if has_start else 0
                        k_sum[i] = sums[table[entry + 4] + i] if has_sum else 1
                    before, columns = panel_at(i, width, lanes)
                    turned_kv[before * depth + d_v * columns + i - before] = k_sum[i]
            clear(by_kv, stride * d_out)
            clear(by_W, stride * d_in)
            clear(by_sum, stride)

            stop = min(n, (task % chunks + 1) * chunk)
            for row in range(task % chunks * chunk, stop, ROWS):
                count = min(ROWS, stop - row)
                whole = -(-count // TILE_ROWS) * TILE_ROWS
                for r in range(count):
                    for p in range(0, d, lanes):
                        x = load_part(q, (row + r) * q_row + p, d - p, lanes, edge) - load(center, p)
                        store_part(rows, r * d + p, x, d - p, lanes, edge)
                        if elu:
                            store(exponents, r * stride + p, x * numbers[0])
                        if has_W:
                            into_panels(panels, r, p, d_in, x, lanes)
                for i in range(count * d, whole * d):
                    rows[i] = 0
                if not elu:
                    multiply(rows, d, 1, whole, packed, d, d, width, lanes, start, 0, exponents, stride)
                for r in range(count):
                    top = log_after(load(exponents, r * stride), start, 0, elu)
                    for i in range(lanes, width, lanes):
                        top = at_least(log_after(load(exponents, r * stride + i), start, i, elu), top)
                    highest = largest(top)
                    if highest == lowest:  # the row sees nothing
                        highest = zero
                    seen = zeros(rows)
                    for i in range(0, width, lanes):
                        y = load(exponents, r * stride + i)
                        e = times_value(exp_negative(log_after(y, start, i, elu) - highest), y, elu)
                        store(exponents, r * stride + i, e)
                        seen = seen + e * load(k_sum, i)
                    edge[0] = total(seen)
                    inverse = one / edge[0] if edge[0] != 0 else zero
                    along = zeros(rows)
                    for j in range(0, d_v, lanes):
                        g = load_part(grad, (row + r) * grad_row + j, d_v - j, lanes, edge) * inverse
                        along = along + g * load_part(out, (row + r) * out_row + j, d_v - j, lanes, edge)
                        into_panels(weighted, r, j, d_out, g, lanes)
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
                        phi = load(exponents, r * stride + i)
                        store(by_sum, i, load(by_sum, i) + phi * e)
                        if elu:
                            y = load_part(rows, r * d + i, d - i, lanes, edge) * numbers[0]
                            phi = phi / (at_least(y, ZERO(y)) + 1.0) * numbers[0]
                        store(by_phi, r * stride + i, load(by_phi, r * stride + i) * phi)
                add_product(exponents, stride, height, weighted, count, d_out, lanes, nothing, part, by_kv)
                if elu:
                    rows_out(grad_q, (item * n + row) * d, count, d, by_phi, stride, lanes, edge)
                else:
                    multiply(by_phi, stride, 1, whole, turned, m, m, d_in, lanes, nothing, 0, result, d_in)
                    rows_out(grad_q, (item * n + row) * d, count, d, result, d_in, lanes, edge)
                if has_W:
                    add_product(by_phi, stride, height, panels, count, d_in, lanes, nothing, part, by_W)

            place = task % chunks * out_rows + item * m
            for i in range(m):
                grad_sum[place + i] = by_sum[i]
            rows_out(grad_kv, place * d_v, m, d_v, by_kv, d_out, lanes, edge)
            if has_W:
                rows_out(grad_W, place * d, m, d, by_W, d_in, lanes, edge)
        buffer[0] = 0  # see `aligned`
        return DONE

    return differentiate
