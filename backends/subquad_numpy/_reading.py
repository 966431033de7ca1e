"""How queries read what keys left (`_summary`) of attention through exponential features, fused likewise.

    out[i] = exp(y[i])ᵀ S / exp(y[i])ᵀ s,            y[i] = q[i] W + start

of q less its center. With W = k̃ᵀ, S = ṽ, s = 1 this is softmax attention to a few keys: the other half of Nyström
attention.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray

from subquad_numpy._compile import DONE, compiled, fingerprint
from subquad_numpy._maps import log_after, times_value
from subquad_numpy._math import exp_negative
from subquad_numpy._product import TILE_ROWS, multiply, pack
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

READING_ROWS = 8 * TILE_ROWS  # of a block: exponents of 256 features take 64 kB

READING_FRAME = (
    *("n", "d", "m", "d_v", "chunks", "chunk"),
    *("q_row", "W_row", "W_step", "kv_row"),
    # start, k_sum: (…, m), or 0 for zeros and ones; numbers are (factor of W,) or of q
    *("q", "W", "start", "kv", "k_sum", "numbers"),
    # table: a row (q, W, start, kv, k_sum, out, center) for each item
    "table",
    # (…, n, d_v); (…, d), or 0
    *("out", "center"),
)


@cache
def reading_kernel(dtype: np.dtype[Any], elu: bool) -> Any:
    """Compile `read(first, last, frame)`, which runs tasks first to last - 1; the chunk varies fastest."""
    lanes = lanes_of(dtype)
    kind = numba.from_dtype(dtype)
    zero, lowest = dtype.type(0), dtype.type(-np.inf)
    stamp = fingerprint()

    @compiled(f"reading by queries {dtype}{' elu' * elu}", READING_FRAME)
    def read(first: int, last: int, frame: Any) -> int:
        stamp  # noqa: B018  part of the key of the cache on disk
        f = carray(frame, 1)[0]
        n, d, m, d_v, chunks, chunk = f.n, f.d, f.m, f.d_v, f.chunks, f.chunk
        q_row, W_row, W_step, kv_row = f.q_row, f.W_row, f.W_step, f.kv_row
        all_q, all_W, starts = pointer(f.q, zero), pointer(f.W, zero), pointer(f.start, zero)
        all_kv, sums = pointer(f.kv, zero), pointer(f.k_sum, zero)
        has_start, has_sum = f.start != 0, f.k_sum != 0
        numbers, table, all_out = pointer(f.numbers, zero), pointer(f.table, np.int64(0)), pointer(f.out, zero)
        has_center, centers = f.center != 0, pointer(f.center, zero)

        width = -(-m // lanes) * lanes
        d_out = -(-d_v // lanes) * lanes
        d_in = -(-d // lanes) * lanes
        scratch = READING_ROWS * (width + d_out + d) + (d + d_out) * width
        buffer = np.empty(scratch + 2 * width + d_out + d_in + 2 * lanes, kind)
        edge = aligned(buffer)
        start = shifted(edge, lanes)
        k_sum = shifted(start, width)
        nothing = shifted(k_sum, width)
        center = shifted(nothing, d_out)
        packed = shifted(center, d_in)
        kv = shifted(packed, d * width)
        exponents = shifted(kv, width * d_out)
        result = shifted(exponents, READING_ROWS * width)
        rows = shifted(result, READING_ROWS * d_out)
        clear(nothing, d_out)
        clear(center, d_in)

        packed_for = -1
        for task in range(first, last):
            item = task // chunks * 7
            q, out = shifted(all_q, table[item]), shifted(all_out, table[item + 5])
            if packed_for != item:
                packed_for = item
                if has_center:
                    row_in(centers, table[item + 6], d, lanes, center)
                if not elu:
                    pack(shifted(all_W, table[item + 1]), W_row, W_step, d, m, numbers[0], lanes, packed, d)
                pack(shifted(all_kv, table[item + 3]), kv_row, 1, m, d_v, 1, lanes, kv, m)
                for i in range(width):
                    start[i] = lowest
                    k_sum[i] = 1
                    if i < m:
                        start[i] = starts[table[item + 2] + i] if has_start else 0
                        k_sum[i] = sums[table[item + 4] + i] if has_sum else 1

            stop = min(n, (task % chunks + 1) * chunk)
            for row in range(task % chunks * chunk, stop, READING_ROWS):
                count = min(READING_ROWS, stop - row)
                whole = -(-count // TILE_ROWS) * TILE_ROWS
                for r in range(count):
                    for p in range(0, d, lanes):
                        x = load_part(q, (row + r) * q_row + p, d - p, lanes, edge) - load(center, p)
                        if elu:
                            store(exponents, r * width + p, x * numbers[0])
                        else:
                            store_part(rows, r * d + p, x, d - p, lanes, edge)
                if not elu:
                    for i in range(count * d, whole * d):
                        rows[i] = 0
                    multiply(rows, d, 1, whole, packed, d, d, width, lanes, start, 0, exponents, width)
                for r in range(count):
                    top = log_after(load(exponents, r * width), start, 0, elu)
                    for i in range(lanes, width, lanes):
                        top = at_least(log_after(load(exponents, r * width + i), start, i, elu), top)
                    highest = largest(top)
                    if highest == lowest:  # the row sees nothing
                        highest = zero
                    seen = zeros(rows)
                    for i in range(0, width, lanes):
                        y = load(exponents, r * width + i)
                        e = times_value(exp_negative(log_after(y, start, i, elu) - highest), y, elu)
                        store(exponents, r * width + i, e)
                        seen = seen + e * load(k_sum, i)
                    edge[0] = total(seen)
                    rows[r] = edge[0] if edge[0] != 0 else 1  # the queries have been read
                multiply(exponents, width, 1, whole, kv, m, m, d_out, lanes, nothing, 0, result, d_out)
                for r in range(count):
                    divisor = spread(rows, r)
                    for j in range(0, d_v, lanes):
                        value = load(result, r * d_out + j) / divisor
                        store_part(out, (row + r) * d_v + j, value, d_v - j, lanes, edge)
        buffer[0] = 0  # see `aligned`
        return DONE

    return read
