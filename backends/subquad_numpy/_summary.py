"""What keys leave of attention through exponential features, fused: no exponent ever leaves the cache of its core.

    S = Σ_j exp(x[j]) v[j]ᵀ,  s = Σ_j exp(x[j]),     x[j] = k[j] W − h |k[j]|²,   both over exp(shift)

of k less its center. With random directions W this is one half of FAVOR+, `_reading` the other; with W = q̃ᵀ it is
softmax attention of a few queries q̃, one half of Nyström attention. Linear attention has x = a number times k[j],
without a matrix, and φ = elu(x) + 1: see `_maps`. A task is one chunk of rows of one item; it goes block by block:
product, exponential, product.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray

from subquad_numpy._compile import DONE, compiled, fingerprint
from subquad_numpy._maps import log_of, times_value
from subquad_numpy._math import exp_negative
from subquad_numpy._product import TILE_ROWS, multiply, pack, panel_at
from subquad_numpy._simd import (
    aligned,
    at_least,
    lanes_of,
    load,
    pointer,
    shifted,
    spread,
    store,
    total,
    zeros,
)
from subquad_numpy._tile import clear, load_part, row_in, store_part

SUMMARY_ROWS = 16 * TILE_ROWS  # of a block: exponents of 256 features take 128 kB

SUMMARY_FRAME = (
    # a task is `chunk` of n rows of an item; m is the most features of an item; out_rows the rows of one chunk's result
    *("n", "d", "m", "d_v", "chunks", "chunk", "out_rows"),
    # elements from row to row, of W also from column to column; columns of k, v are adjacent
    *("k_row", "v_row", "W_row", "W_step"),
    # addresses; mask is of bytes, or 0; numbers are (h, factor of W); without W the factor is that of k
    *("k", "v", "W", "mask", "numbers"),
    # table of int64: a row (k, v, W, mask, out, m, center) for each item: elements to its first, row of its result,
    # features
    "table",
    # (chunks, out_rows), (chunks, out_rows, d_v), (chunks, out_rows)
    *("shift", "kv", "k_sum"),
    # (…, d), or 0
    "center",
)


@cache
def summary_kernel(dtype: np.dtype[Any], elu: bool) -> Any:
    """Compile `summarize(first, last, frame)`, which runs tasks first to last - 1; the chunk varies fastest."""
    lanes = lanes_of(dtype)
    kind = numba.from_dtype(dtype)
    zero, lowest, least = dtype.type(0), dtype.type(-np.inf), np.finfo(dtype).min
    stamp = fingerprint()

    @compiled(f"summary of keys {dtype}{' elu' * elu}", SUMMARY_FRAME)
    def summarize(first: int, last: int, frame: Any) -> int:
        stamp  # noqa: B018  part of the key of the cache on disk
        f = carray(frame, 1)[0]
        n, d, most, d_v, chunks, chunk, out_rows = f.n, f.d, f.m, f.d_v, f.chunks, f.chunk, f.out_rows
        k_row, v_row, W_row, W_step = f.k_row, f.v_row, f.W_row, f.W_step
        all_k, all_v, all_W = pointer(f.k, zero), pointer(f.v, zero), pointer(f.W, zero)
        has_mask, all_masks = f.mask != 0, pointer(f.mask, np.uint8(0))
        numbers, table = pointer(f.numbers, zero), pointer(f.table, np.int64(0))
        out_shift, out_kv, out_sum = pointer(f.shift, zero), pointer(f.kv, zero), pointer(f.k_sum, zero)
        has_center, centers = f.center != 0, pointer(f.center, zero)
        half_scale, factor = numbers[0], numbers[1]

        depth = d + 1  # the last column of a key holds −h|k|², against a row of ones
        widest = -(-most // lanes) * lanes
        stride = -(-(-(-widest // TILE_ROWS) * TILE_ROWS) // lanes) * lanes  # features of an item, in whole tiles
        d_out = -(-d_v // lanes) * lanes
        d_in = -(-d // lanes) * lanes
        scratch = SUMMARY_ROWS * (d_out + stride + depth) + depth * widest + 2 * stride * d_out
        buffer = np.empty(scratch + 4 * stride + max(stride, d_out) + d_in + 2 * lanes, kind)
        edge = aligned(buffer)
        shift = shifted(edge, lanes)
        new = shifted(shift, stride)
        k_sum = shifted(new, stride)
        block_sum = shifted(k_sum, stride)
        nothing = shifted(block_sum, stride)
        center = shifted(nothing, max(stride, d_out))
        kv = shifted(center, d_in)
        block_kv = shifted(kv, stride * d_out)
        packed = shifted(block_kv, stride * d_out)
        values = shifted(packed, depth * widest)
        exponents = shifted(values, SUMMARY_ROWS * d_out)
        rows = shifted(exponents, SUMMARY_ROWS * stride)
        finite = zeros(edge) + least  # in place of −∞, which cannot be subtracted from itself
        clear(nothing, max(stride, d_out))
        clear(exponents, SUMMARY_ROWS * stride)
        clear(center, d_in)

        packed_from = packed_m = -1
        for task in range(first, last):
            item = task // chunks * 7
            k, v = shifted(all_k, table[item]), shifted(all_v, table[item + 1])
            mask = shifted(all_masks, table[item + 3])
            m = table[item + 5]
            if has_center:
                row_in(centers, table[item + 6], d, lanes, center)
            width = -(-m // lanes) * lanes
            height = -(-width // TILE_ROWS) * TILE_ROWS  # features are the rows of Eᵀ v: whole tiles
            if not elu and (packed_from != table[item + 2] or packed_m != m):
                packed_from, packed_m = table[item + 2], m
                pack(shifted(all_W, packed_from), W_row, W_step, d, m, factor, lanes, packed, depth)
                for i in range(width):
                    before, columns = panel_at(i, width, lanes)
                    packed[before * depth + d * columns + i - before] = 1
            for i in range(stride):
                shift[i] = lowest
                k_sum[i] = 0
            clear(kv, stride * d_out)

            row = task % chunks * chunk
            stop = min(n, row + chunk)
            while row < stop:
                count = 0
                while row < stop and count < SUMMARY_ROWS:
                    if not has_mask or mask[row] != 0:
                        square = zeros(rows)
                        for p in range(0, d, lanes):
                            x = load_part(k, row * k_row + p, d - p, lanes, edge) - load(center, p)
                            square = square + x * x
                            if elu:
                                store(exponents, count * stride + p, x * factor)
                            else:
                                store_part(rows, count * depth + p, x, d - p, lanes, edge)
                        # |k|² overflows long before k itself, and 0 · ∞ is NaN
                        rows[count * depth + d] = -half_scale * total(square) if half_scale != 0 else 0
                        for j in range(0, d_v, lanes):
                            before, columns = panel_at(j, d_out, lanes)
                            place = before * SUMMARY_ROWS + count * columns + j - before
                            store(values, place, load_part(v, row * v_row + j, d_v - j, lanes, edge))
                        count += 1
                    row += 1
                if count == 0:
                    break
                whole = -(-count // TILE_ROWS) * TILE_ROWS
                if not elu:
                    for i in range(count * depth, whole * depth):
                        rows[i] = 0
                    multiply(
                        rows, depth, 1, whole, packed, depth, depth, width, lanes, nothing, 0, exponents, stride
                    )  # fmt: skip
                for i in range(0, width, lanes):
                    store(new, i, load(shift, i))
                for r in range(count):
                    for i in range(0, width, lanes):
                        store(new, i, at_least(log_of(load(exponents, r * stride + i), elu), load(new, i)))
                for i in range(0, width, lanes):
                    store(block_sum, i, zeros(rows))
                for r in range(count):
                    for i in range(0, width, lanes):
                        y = load(exponents, r * stride + i)
                        e = times_value(exp_negative(log_of(y, elu) - at_least(load(new, i), finite)), y, elu)
                        store(exponents, r * stride + i, e)
                        store(block_sum, i, load(block_sum, i) + e)
                multiply(
                    exponents, 1, stride, height, values, SUMMARY_ROWS, count, d_out, lanes, nothing, 0, block_kv, d_out
                )  # fmt: skip
                for i in range(0, width, lanes):
                    fade = exp_negative(load(shift, i) - at_least(load(new, i), finite))
                    store(k_sum, i, load(k_sum, i) * fade + load(block_sum, i))
                    store(shift, i, fade)
                for i in range(m):
                    fade = spread(shift, i)
                    for j in range(0, d_out, lanes):
                        store(kv, i * d_out + j, load(kv, i * d_out + j) * fade + load(block_kv, i * d_out + j))
                for i in range(0, width, lanes):
                    store(shift, i, load(new, i))

            place = task % chunks * out_rows + table[item + 4]
            for i in range(m):
                out_shift[place + i] = shift[i]
                out_sum[place + i] = k_sum[i]
                for j in range(0, d_v, lanes):
                    value = load(kv, i * d_out + j)
                    store_part(out_kv, (place + i) * d_v + j, value, d_v - j, lanes, edge)
        buffer[0] = 0  # see `aligned`
        return DONE

    return summarize
