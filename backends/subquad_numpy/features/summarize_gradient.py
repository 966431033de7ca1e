"""The gradient of attention through exponential features by keys and values, fused.

    dx = φ_k ∘ (v dSᵀ + ds),  dv = φ_k dS,  dk = dx Wᵀ − 2 h (Σ_m dx) k

For φ_k = elu(x) + 1, dx = φ_k / (1 + max(x, 0)) ∘ (…) and dk = factor dx. dS and ds are sums of `attend_gradient`; the
other letters are those of `blocks`. The gradient by W is written as its transpose, Σ_j dx[j] k[j]ᵀ, (m, d), for each
chunk of keys.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import cut, load, pointer, room, shifted, spread, store, total, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row, load_part, store_part
from subquad_numpy.codegen.matmul import TILE_ROWS, Panels, into_panels, multiply, pack, padded, rows_at, turned
from subquad_numpy.codegen.vector_math import exp_negative
from subquad_numpy.features.blocks import (
    HEAD,
    OF_KEYS,
    Scratch,
    Side,
    add_product,
    ask_row,
    directions_of,
    key_exponents,
    load_center,
    pack_keys,
    sizes_of,
    store_rows,
    visible_rows,
    widths_of,
)
from subquad_numpy.features.phi import ELU, MAPS, log_of, times_value
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.runtime.stored import AS_COMPUTED

ROWS = 8 * TILE_ROWS  # rows of a block: half of those of `summarize`, for two matrices (rows, m)
SUMMARIZE_GRADIENT_RECORD = fields(
    HEAD,
    OF_KEYS,
    # the shift of the forward pass; dS and ds
    {"shift": 2, "grad_kv": 2, "grad_sum": 2},
    # Contiguous. Rows of hidden keys are not written. grad_W points to the first chunk's sums; those of the next chunk
    # follow `chunk_step` features later.
    {"grad_k": 2, "grad_v": 2, "grad_W": 2, "chunk_step": None},
)


@cache
def summarize_gradient_kernel(dtype: np.dtype[Any], phi_name: str) -> Any:
    """Compile the gradient by keys; among the tasks of an item the chunk varies fastest."""
    lanes, kind, zero = element(dtype)
    phi = MAPS[phi_name].number

    @compiled(f"gradient of summarize {dtype} {phi_name}", SUMMARIZE_GRADIENT_RECORD)
    def differentiate(first: int, last: int, frames: Any) -> int:
        f = frames[0]
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
            edge, shift, by_sum, nothing, center, packed, packed_turned, by_kv, by_kv_turned,
            by_W, part, y, by_y, by_k, by_v, panels, rows, values,
        ) = cut(buffer, sizes)  # fmt: skip
        clear(nothing, widest)
        clear(center, d_in)
        clear(y, ROWS * stride)
        clear(by_y, ROWS * stride)
        phi_k, by_phi = rows_at(y, stride), rows_at(by_y, stride)
        k_gradient, v_gradient, W_gradient = rows_at(by_k, d_in), rows_at(by_v, d_out), rows_at(by_W, d_in)
        directions, directions_turned = Panels(packed, depth), Panels(packed_turned, m)
        kv_panels, kv_turned, block = Panels(by_kv, m), Panels(by_kv_turned, d_v), Panels(panels, ROWS)
        scratch, zero_row = Scratch(rows, nothing, edge), rows_at(nothing, 0)

        packed_for = -1  # the item whose directions and sums are in scratch: often that of the task before
        for task in range(first, last):
            item = task // chunks
            f = frames[item]
            k, v, numbers = pointer(f.x, zero), pointer(f.v, zero), pointer(f.numbers, zero)
            k_row, v_row, mask = f.x_row, f.v_row, pointer(f.mask, np.uint8(0))
            grad_k, grad_v = pointer(f.grad_k, zero), pointer(f.grad_v, zero)
            factor, half_scale = numbers[0], numbers[1]
            is_whole = phi != ELU and f.mask == 0 and f.center == 0 and half_scale == 0 and d == d_in and d_v == d_out
            if packed_for != item:
                packed_for = item
                load_center(f, d, lanes, center, zero)
                W, kv = directions_of(f, zero), rows_at(pointer(f.grad_kv, zero), d_v)
                if phi != ELU:
                    pack_keys(W, d, m, factor, lanes, directions)
                    pack(turned(W), m, d, factor, lanes, directions_turned)
                pack(kv, m, d_v, 1, lanes, kv_panels)
                pack(turned(kv), d_v, m, 1, lanes, kv_turned)
                load_padded_row(pointer(f.shift, zero), 0, m, lanes, shift)
                load_padded_row(pointer(f.grad_sum, zero), 0, m, lanes, by_sum)
            keys = Side(d, center, numbers, directions, width)
            clear(by_W, stride * d_in)

            row = task % chunks * chunk
            stop = min(n, row + chunk)
            while True:
                count, row = visible_rows(mask, f.mask != 0, row, stop, ROWS, places)
                if count == 0:
                    break
                whole = padded(count, TILE_ROWS)
                # rows in whole tiles and vectors are read where they lie, and their gradients written where they belong
                fits = is_whole and count == whole
                here_k, here_v, step_v = shifted(k, places[0] * k_row), values, d_v
                if fits:
                    here_v, step_v = shifted(v, places[0] * v_row), v_row
                    multiply(rows_at(here_k, k_row), whole, directions, d, width, lanes, zero_row, phi_k)
                    for r in range(count if has_W else 0):
                        for p in range(0, d, lanes):
                            into_panels(block, r, p, d_in, load(here_k, r * k_row + p), lanes)
                else:
                    key_exponents(rows_at(k, k_row), AS_COMPUTED, places, count, keys, phi_k, scratch, lanes, phi)
                    for r in range(count):
                        for p in range(0, 0 if phi == ELU else d, lanes):
                            x = load_part(rows, r * depth + p, d - p, lanes, edge)
                            store(by_k, r * d_in + p, x)
                            if has_W:
                                into_panels(block, r, p, d_in, x, lanes)
                        for j in range(0, d_v, lanes):
                            value = load_part(v, places[r] * v_row + j, d_v - j, lanes, edge)
                            store_part(values, r * d_v + j, value, d_v - j, lanes, edge)
                    for i in range(count * d_v, whole * d_v):
                        values[i] = 0
                multiply(rows_at(here_v, step_v), whole, kv_turned, d_v, width, lanes, rows_at(by_sum, 0), by_phi)
                for r in range(count):
                    sum_phi = zeros(rows)
                    if row + r < stop:  # rows of the next block are asked for meanwhile
                        ask_row(k, AS_COMPUTED, (row + r) * k_row, d, lanes)
                        ask_row(v, AS_COMPUTED, (row + r) * v_row, d_v, lanes)
                    for i in range(0, width, lanes):
                        exponent = load(y, r * stride + i)
                        e = exp_negative(log_of(exponent, phi) - load(shift, i))
                        change = load(by_y, r * stride + i) * e
                        store(y, r * stride + i, times_value(e, exponent, phi))
                        store(by_y, r * stride + i, change * factor if phi == ELU else change)
                        sum_phi = sum_phi + change
                    if phi != ELU and not fits:
                        edge[0] = -2 * half_scale * total(sum_phi)
                        norm = spread(edge, 0)
                        for p in range(0, d, lanes):
                            store(by_k, r * d_in + p, load(by_k, r * d_in + p) * norm)
                if fits:
                    by_rows = rows_at(shifted(grad_v, places[0] * d_v), d_v)
                    multiply(phi_k, whole, kv_panels, m, d_out, lanes, zero_row, by_rows)
                    by_rows = rows_at(shifted(grad_k, places[0] * d), d)
                    multiply(by_phi, whole, directions_turned, m, d_in, lanes, zero_row, by_rows)
                else:
                    multiply(phi_k, whole, kv_panels, m, d_out, lanes, zero_row, v_gradient)
                    if phi != ELU:
                        multiply(by_phi, whole, directions_turned, m, d_in, lanes, k_gradient, k_gradient)
                for r in range(0 if fits else count):
                    by_row = rows_at(shifted(by_y, r * stride) if phi == ELU else shifted(by_k, r * d_in), 0)
                    store_rows(shifted(grad_k, places[r] * d), 1, d, by_row, lanes, edge)
                    by_value = rows_at(shifted(by_v, r * d_out), 0)
                    store_rows(shifted(grad_v, places[r] * d_v), 1, d_v, by_value, lanes, edge)
                if has_W:
                    add_product(turned(by_phi), height, block, count, W_gradient, part, nothing, lanes)

            if has_W:
                place = task % chunks * f.chunk_step * d
                store_rows(shifted(pointer(f.grad_W, zero), place), m, d, W_gradient, lanes, edge)
        return DONE

    return differentiate
