"""The gradient of attention through exponential features by keys and values.

    dx = φ_k ∘ (v dSᵀ + ds),  dv = φ_k dS,  dk = dx Wᵀ − 2 h (Σ_m dx) k

or dx = φ_k / (1 + max(x, 0)) ∘ (…), dk = factor dx where φ_k = elu(x) + 1. dS and ds are the sums of `_query_gradient`,
the other letters those of `_gradient_blocks`. The directions' own gradient comes turned: Σ_j dx[j] k[j]ᵀ, (m, d), of
one chunk of keys.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray

from subquad_numpy._compile import DONE, compiled, fingerprint
from subquad_numpy._gradient_blocks import ROWS, add_product, into_panels, rows_out
from subquad_numpy._maps import log_of, times_value
from subquad_numpy._math import exp_negative
from subquad_numpy._product import TILE_ROWS, multiply, pack, panel_at
from subquad_numpy._simd import aligned, lanes_of, load, pointer, shifted, spread, store, total, zeros
from subquad_numpy._tile import clear, load_part, row_in, store_part

KEY_FRAME = (
    *("n", "d", "m", "d_v", "chunks", "chunk", "out_rows"),
    *("k_row", "v_row", "W_row", "W_step"),
    # mask is of bytes, or 0; numbers are (h, factor of W)
    *("k", "v", "W", "mask", "numbers", "center"),
    # table: a row (k, v, W, mask, center) for each item
    "table",
    # (items, m), (items, m, d_v), (items, m): what the forward pass left, and the sums over queries
    *("shift", "grad_kv", "grad_sum"),
    # (items, n, d), (items, n, d_v), (chunks, out_rows, d) or 0
    *("grad_k", "grad_v", "grad_W"),
)


@cache
def key_gradient_kernel(dtype: np.dtype[Any], elu: bool) -> Any:
    """Compile `differentiate(first, last, frame)` for keys; the chunk varies fastest."""
    lanes = lanes_of(dtype)
    kind = numba.from_dtype(dtype)
    zero = dtype.type(0)
    stamp = fingerprint()

    @compiled(f"gradient by keys {dtype}{' elu' * elu}", KEY_FRAME)
    def differentiate(first: int, last: int, frame: Any) -> int:
        stamp  # noqa: B018  part of the key of the cache on disk
        f = carray(frame, 1)[0]
        n, d, m, d_v, chunks, chunk, out_rows = f.n, f.d, f.m, f.d_v, f.chunks, f.chunk, f.out_rows
        k_row, v_row, W_row, W_step = f.k_row, f.v_row, f.W_row, f.W_step
        all_k, all_v, all_W = pointer(f.k, zero), pointer(f.v, zero), pointer(f.W, zero)
        has_mask, all_masks = f.mask != 0, pointer(f.mask, np.uint8(0))
        numbers, has_center, centers = pointer(f.numbers, zero), f.center != 0, pointer(f.center, zero)
        table = pointer(f.table, np.int64(0))
        shifts, all_kv, all_sums = pointer(f.shift, zero), pointer(f.grad_kv, zero), pointer(f.grad_sum, zero)
        grad_k, grad_v = pointer(f.grad_k, zero), pointer(f.grad_v, zero)
        has_W, grad_W = f.grad_W != 0, pointer(f.grad_W, zero)
        half_scale, factor = numbers[0], numbers[1]

        width = -(-m // lanes) * lanes
        height = -(-width // TILE_ROWS) * TILE_ROWS
        stride = -(-height // lanes) * lanes
        d_in, d_out, depth = -(-d // lanes) * lanes, -(-d_v // lanes) * lanes, d + 1
        widest = max(d_in, d_out)
        size = ROWS * (2 * stride + 2 * d_in + d_out + depth + d_v) + depth * width + m * (d_in + d_out) + d_v * width
        size += 2 * stride * d_in + 2 * stride + max(stride, widest) + d_in
        buffer = np.empty(size + 2 * lanes, kind)
        edge = aligned(buffer)
        shift = shifted(edge, lanes)
        by_sum = shifted(shift, stride)
        nothing = shifted(by_sum, stride)
        center = shifted(nothing, max(stride, widest))
        packed = shifted(center, d_in)
        turned = shifted(packed, depth * width)
        by_kv = shifted(turned, m * d_in)
        turned_kv = shifted(by_kv, m * d_out)
        by_W = shifted(turned_kv, d_v * width)
        part = shifted(by_W, stride * d_in)
        exponents = shifted(part, stride * d_in)
        by_phi = shifted(exponents, ROWS * stride)
        by_k = shifted(by_phi, ROWS * stride)
        by_v = shifted(by_k, ROWS * d_in)
        panels = shifted(by_v, ROWS * d_out)
        rows = shifted(panels, ROWS * d_in)
        values = shifted(rows, ROWS * depth)
        places = np.empty(ROWS, np.int64)
        clear(nothing, max(stride, widest))
        clear(center, d_in)
        clear(exponents, 2 * ROWS * stride)

        packed_for = -1
        for task in range(first, last):
            item = task // chunks
            entry = item * 5
            k, v = shifted(all_k, table[entry]), shifted(all_v, table[entry + 1])
            mask = shifted(all_masks, table[entry + 3])
            if packed_for != item:
                packed_for = item
                if has_center:
                    row_in(centers, table[entry + 4], d, lanes, center)
                W, kv = shifted(all_W, table[entry + 2]), shifted(all_kv, item * m * d_v)
                if not elu:
                    pack(W, W_row, W_step, d, m, factor, lanes, packed, depth)
                    pack(W, W_step, W_row, m, d, factor, lanes, turned, m)
                pack(kv, d_v, 1, m, d_v, 1, lanes, by_kv, m)
                pack(kv, 1, d_v, d_v, m, 1, lanes, turned_kv, d_v)
                row_in(shifts, item * m, m, lanes, shift)
                row_in(all_sums, item * m, m, lanes, by_sum)
                for i in range(width):
                    before, columns = panel_at(i, width, lanes)
                    packed[before * depth + d * columns + i - before] = 1
            clear(by_W, stride * d_in)

            row = task % chunks * chunk
            stop = min(n, row + chunk)
            while row < stop:
                count = 0
                while row < stop and count < ROWS:
                    if not has_mask or mask[row] != 0:
                        square = zeros(rows)
                        for p in range(0, d, lanes):
                            x = load_part(k, row * k_row + p, d - p, lanes, edge) - load(center, p)
                            square = square + x * x
                            store(by_k, count * d_in + p, x)
                            store_part(rows, count * depth + p, x, d - p, lanes, edge)
                            if elu:
                                store(exponents, count * stride + p, x * factor)
                            if has_W:
                                into_panels(panels, count, p, d_in, x, lanes)
                        # |k|² overflows long before k itself, and 0 · ∞ is NaN
                        rows[count * depth + d] = -half_scale * total(square) if half_scale != 0 else 0
                        for j in range(0, d_v, lanes):
                            y = load_part(v, row * v_row + j, d_v - j, lanes, edge)
                            store_part(values, count * d_v + j, y, d_v - j, lanes, edge)
                        places[count] = item * n + row
                        count += 1
                    else:
                        for p in range(d):
                            grad_k[(item * n + row) * d + p] = 0
                        for j in range(d_v):
                            grad_v[(item * n + row) * d_v + j] = 0
                    row += 1
                if count == 0:
                    break
                whole = -(-count // TILE_ROWS) * TILE_ROWS
                for i in range(count * depth, whole * depth):
                    rows[i] = 0
                for i in range(count * d_v, whole * d_v):
                    values[i] = 0
                if not elu:
                    multiply(
                        rows, depth, 1, whole, packed, depth, depth, width, lanes, nothing, 0, exponents, stride
                    )  # fmt: skip
                multiply(values, d_v, 1, whole, turned_kv, d_v, d_v, width, lanes, by_sum, 0, by_phi, stride)
                for r in range(count):
                    sum_phi = zeros(rows)
                    for i in range(0, width, lanes):
                        y = load(exponents, r * stride + i)
                        phi = exp_negative(log_of(y, elu) - load(shift, i))
                        change = load(by_phi, r * stride + i) * phi
                        store(exponents, r * stride + i, times_value(phi, y, elu))
                        store(by_phi, r * stride + i, change * factor if elu else change)
                        sum_phi = sum_phi + change
                    edge[0] = -2 * half_scale * total(sum_phi)
                    norm = spread(edge, 0)
                    for p in range(0, d, lanes):
                        store(by_k, r * d_in + p, load(by_k, r * d_in + p) * norm)
                multiply(exponents, stride, 1, whole, by_kv, m, m, d_out, lanes, nothing, 0, by_v, d_out)
                if not elu:
                    multiply(by_phi, stride, 1, whole, turned, m, m, d_in, lanes, by_k, d_in, by_k, d_in)
                for r in range(count):
                    by_row = shifted(by_phi, r * stride) if elu else shifted(by_k, r * d_in)
                    rows_out(grad_k, places[r] * d, 1, d, by_row, d_in, lanes, edge)
                    rows_out(grad_v, places[r] * d_v, 1, d_v, shifted(by_v, r * d_out), d_out, lanes, edge)
                if has_W:
                    add_product(by_phi, stride, height, panels, count, d_in, lanes, nothing, part, by_W)

            if has_W:
                rows_out(grad_W, (task % chunks * out_rows + item * m) * d, m, d, by_W, d_in, lanes, edge)
        buffer[0] = 0  # see `aligned`
        return DONE

    return differentiate
