"""How queries read what keys left (`summarize`) of attention through exponential features, fused likewise.

    out[i] = exp(y[i])ᵀ S / exp(y[i])ᵀ s

in the letters of `blocks`. With W = k̃ᵀ, S = ṽ, s = 1 this is softmax attention to a few keys: the other half
of Nyström attention.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray

from subquad_numpy.codegen import cut, lanes_of, load, pointer, room, shifted, spread
from subquad_numpy.codegen.compile import DONE, compiled
from subquad_numpy.codegen.copies import clear, store_part
from subquad_numpy.codegen.matmul import TILE_ROWS, multiply, pack, padded
from subquad_numpy.features.blocks import (
    HEAD,
    OF_QUERIES,
    load_center,
    load_start,
    query_exponents,
    query_features,
    sizes_of,
    widths_of,
)
from subquad_numpy.runtime.arguments import fields

ROWS = 8 * TILE_ROWS  # of a block: exponents of 256 features take 64 kB

ATTEND_RECORD = fields(HEAD, OF_QUERIES, {"out": 2})


@cache
def attend_kernel(dtype: np.dtype[Any], elu: bool) -> Any:
    """Compile `read(first, last, frames)`, which runs tasks first to last - 1; the chunk varies fastest."""
    lanes = lanes_of(dtype)
    kind = numba.from_dtype(dtype)
    zero = dtype.type(0)

    @compiled(f"reading by queries {dtype}{' elu' * elu}", ATTEND_RECORD)
    def read(first: int, last: int, frames: Any) -> int:
        f = carray(frames, last)[0]
        n, d, m, d_v, chunks, chunk = sizes_of(f)
        width, _, stride, d_in, d_out = widths_of(m, d, d_v, lanes)
        sizes = (
            *(lanes, ROWS, ROWS, width, width, d_out, d_in, d * width, width * d_out),
            *(ROWS * stride, ROWS * d_out, ROWS * d),
        )
        buffer = np.empty(room(sizes), kind)
        edge, seen, level, start, k_sum, nothing, center, packed, kv, phi, result, rows = cut(buffer, sizes)
        clear(nothing, d_out)
        clear(center, d_in)
        clear(phi, ROWS * stride)

        packed_for = -1
        for task in range(first, last):
            item = task // chunks
            f = carray(frames, last)[item]
            q, q_row, numbers, out = pointer(f.x, zero), f.x_row, pointer(f.numbers, zero), pointer(f.out, zero)
            if packed_for != item:
                packed_for = item
                load_center(f, d, lanes, center, zero)
                if not elu:
                    pack(pointer(f.W, zero), f.W_row, f.W_column, d, m, numbers[0], lanes, packed, d)
                pack(pointer(f.kv, zero), f.kv_row, 1, m, d_v, 1, lanes, kv, m)
                load_start(f, m, width, zero, start, k_sum)

            stop = min(n, (task % chunks + 1) * chunk)
            for row in range(task % chunks * chunk, stop, ROWS):
                count = min(ROWS, stop - row)
                query_exponents(
                    shifted(q, row * q_row), q_row, count, d, center, numbers, packed, start,
                    width, lanes, edge, elu, rows, phi, stride,
                )  # fmt: skip
                query_features(phi, stride, count, start, k_sum, width, lanes, elu, seen, level)
                whole = padded(count, TILE_ROWS)
                multiply(phi, stride, 1, whole, kv, m, m, d_out, lanes, nothing, 0, result, d_out)
                for r in range(count):
                    if seen[r] == 0:  # the row sees nothing
                        seen[r] = 1
                    divisor = spread(seen, r)
                    for j in range(0, d_v, lanes):
                        value = load(result, r * d_out + j) / divisor
                        store_part(out, (row + r) * d_v + j, value, d_v - j, lanes, edge)
        buffer[0] = 0  # see `cut`
        return DONE

    return read
