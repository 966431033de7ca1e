"""The gradient of attention through exponential features by keys and values.

    dx = φ_k ∘ (v dSᵀ + ds),  dv = φ_k dS,  dk = dx Wᵀ − 2 h (Σ_m dx) k

or dx = φ_k / (1 + max(x, 0)) ∘ (…), dk = factor dx where φ_k = elu(x) + 1. dS and ds are the sums of `attend_gradient`,
the other letters those of `blocks`. The directions' own gradient comes turned: Σ_j dx[j] k[j]ᵀ, (m, d), of
one chunk of keys.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray

from subquad_numpy.codegen import cut, lanes_of, load, pointer, room, shifted, spread, store, total, zeros
from subquad_numpy.codegen.compile import DONE, compiled
from subquad_numpy.codegen.copies import clear, load_padded_row, load_part, store_part
from subquad_numpy.codegen.matmul import TILE_ROWS, multiply, pack, padded
from subquad_numpy.codegen.vector_math import exp_negative
from subquad_numpy.features.blocks import (
    HEAD,
    OF_KEYS,
    add_product,
    into_panels,
    key_exponents,
    load_center,
    pack_keys,
    sizes_of,
    store_rows,
    visible_rows,
    widths_of,
)
from subquad_numpy.features.phi import log_of, times_value
from subquad_numpy.runtime.arguments import fields

ROWS = 8 * TILE_ROWS  # of a block

# what the forward pass left, and the sums over queries
SUMMARIZE_GRADIENT_RECORD = fields(
    HEAD,
    OF_KEYS,
    {"shift": 2, "grad_kv": 2, "grad_sum": 2},
    # contiguous, zeros where the mask hides; the first chunk's sums, and features from them to those of the next
    {"grad_k": 2, "grad_v": 2, "grad_W": 2, "chunk_step": None},
)


@cache
def summarize_gradient_kernel(dtype: np.dtype[Any], elu: bool) -> Any:
    """Compile `differentiate(first, last, frames)` for keys; the chunk varies fastest."""
    lanes = lanes_of(dtype)
    kind = numba.from_dtype(dtype)
    zero = dtype.type(0)

    @compiled(f"gradient by keys {dtype}{' elu' * elu}", SUMMARIZE_GRADIENT_RECORD)
    def differentiate(first: int, last: int, frames: Any) -> int:
        f = carray(frames, last)[0]
        n, d, m, d_v, chunks, chunk = sizes_of(f)
        has_W = f.grad_W != 0
        depth = d + 1  # the last number of a key is −h|k|²
        width, height, stride, d_in, d_out = widths_of(m, d, d_v, lanes)
        widest = max(stride, d_in, d_out)
        sizes = (
            *(lanes, stride, stride, widest, d_in, depth * width, m * d_in, m * d_out, d_v * width),
            *(stride * d_in, stride * d_in, ROWS * stride, ROWS * stride, ROWS * d_in, ROWS * d_out),
            *(ROWS * d_in, ROWS * depth, ROWS * d_v),
        )
        buffer, places = np.empty(room(sizes), kind), np.empty(ROWS, np.int64)
        (
            edge, shift, by_sum, nothing, center, packed, turned, by_kv, turned_kv,
            by_W, part, phi, by_phi, by_k, by_v, panels, rows, values,
        ) = cut(buffer, sizes)  # fmt: skip
        clear(nothing, widest)
        clear(center, d_in)
        clear(phi, ROWS * stride)
        clear(by_phi, ROWS * stride)

        packed_for = -1
        for task in range(first, last):
            item = task // chunks
            f = carray(frames, last)[item]
            k, v, numbers = pointer(f.x, zero), pointer(f.v, zero), pointer(f.numbers, zero)
            k_row, v_row, mask = f.x_row, f.v_row, pointer(f.mask, np.uint8(0))
            grad_k, grad_v = pointer(f.grad_k, zero), pointer(f.grad_v, zero)
            factor, half_scale = numbers[0], numbers[1]
            if packed_for != item:
                packed_for = item
                load_center(f, d, lanes, center, zero)
                W, kv = pointer(f.W, zero), pointer(f.grad_kv, zero)
                if not elu:
                    pack_keys(W, f.W_row, f.W_column, d, m, factor, lanes, packed)
                    pack(W, f.W_column, f.W_row, m, d, factor, lanes, turned, m)
                pack(kv, d_v, 1, m, d_v, 1, lanes, by_kv, m)
                pack(kv, 1, d_v, d_v, m, 1, lanes, turned_kv, d_v)
                load_padded_row(pointer(f.shift, zero), 0, m, lanes, shift)
                load_padded_row(pointer(f.grad_sum, zero), 0, m, lanes, by_sum)
            clear(by_W, stride * d_in)

            row = task % chunks * chunk
            stop = min(n, row + chunk)
            while True:
                count, row = visible_rows(mask, f.mask != 0, row, stop, ROWS, places)
                if count == 0:
                    break
                key_exponents(
                    k, k_row, places, count, d, center, numbers, packed, nothing,
                    width, lanes, edge, elu, rows, phi, stride,
                )  # fmt: skip
                for r in range(count):
                    for p in range(0, 0 if elu else d, lanes):
                        x = load_part(rows, r * depth + p, d - p, lanes, edge)
                        store(by_k, r * d_in + p, x)
                        if has_W:
                            into_panels(panels, ROWS, r, p, d_in, x, lanes)
                    for j in range(0, d_v, lanes):
                        y = load_part(v, places[r] * v_row + j, d_v - j, lanes, edge)
                        store_part(values, r * d_v + j, y, d_v - j, lanes, edge)
                whole = padded(count, TILE_ROWS)
                for i in range(count * d_v, whole * d_v):
                    values[i] = 0
                multiply(values, d_v, 1, whole, turned_kv, d_v, d_v, width, lanes, by_sum, 0, by_phi, stride)
                for r in range(count):
                    sum_phi = zeros(rows)
                    for i in range(0, width, lanes):
                        y = load(phi, r * stride + i)
                        e = exp_negative(log_of(y, elu) - load(shift, i))
                        change = load(by_phi, r * stride + i) * e
                        store(phi, r * stride + i, times_value(e, y, elu))
                        store(by_phi, r * stride + i, change * factor if elu else change)
                        sum_phi = sum_phi + change
                    if not elu:
                        edge[0] = -2 * half_scale * total(sum_phi)
                        norm = spread(edge, 0)
                        for p in range(0, d, lanes):
                            store(by_k, r * d_in + p, load(by_k, r * d_in + p) * norm)
                multiply(phi, stride, 1, whole, by_kv, m, m, d_out, lanes, nothing, 0, by_v, d_out)
                if not elu:
                    multiply(by_phi, stride, 1, whole, turned, m, m, d_in, lanes, by_k, d_in, by_k, d_in)
                for r in range(count):
                    by_row = shifted(by_phi, r * stride) if elu else shifted(by_k, r * d_in)
                    store_rows(grad_k, places[r] * d, 1, d, by_row, d_in, lanes, edge)
                    store_rows(grad_v, places[r] * d_v, 1, d_v, shifted(by_v, r * d_out), d_out, lanes, edge)
                if has_W:
                    add_product(by_phi, stride, height, panels, ROWS, count, d_in, lanes, nothing, part, by_W)

            if has_W:
                place = task % chunks * f.chunk_step * d
                store_rows(pointer(f.grad_W, zero), place, m, d, by_W, d_in, lanes, edge)
        buffer[0] = 0  # see `cut`
        return DONE

    return differentiate
