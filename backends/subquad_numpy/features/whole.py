"""Attention through features that is not causal, of an item whose keys are few enough to be summed up by one task.

    out[i] = exp(y[i])ᵀ S / exp(y[i])ᵀ s,    S = Σ_j exp(x[j]) v[j]ᵀ,  s = Σ_j exp(x[j])

in the letters of `blocks`. A task does what one of `summarize` and then one of `attend` do, number by number, but the
state between them stays in scratch memory.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import cut, pointer, room
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row
from subquad_numpy.codegen.matmul import PANEL_VECTORS, Matrix, Panels, pack, rows_at
from subquad_numpy.codegen.stored import stored_as
from subquad_numpy.features import attend
from subquad_numpy.features.attend import Reading, read_rows
from subquad_numpy.features.blocks import (
    HEAD,
    KEYS,
    OF_KEYS,
    OUTPUT,
    QUERIES,
    SIDE,
    VALUES,
    Scratch,
    Side,
    State,
    directions_of,
    load_center,
    pack_keys,
    widths_of,
)
from subquad_numpy.features.phi import ELU, MAPS
from subquad_numpy.features.summarize import ROWS, Sums, sum_rows
from subquad_numpy.runtime.arguments import fields

READ_ROWS = attend.ROWS

# An item is one task. The fields q_* are the queries' `SIDE`, those without prefix are the keys'; n_q is their number.
WHOLE_RECORD = fields(HEAD, OF_KEYS, {f"q_{name}": axes for name, axes in SIDE.items()}, {"n_q": None, "out": 2})


@cache
def whole_kernel(dtype: np.dtype[Any], phi_name: str) -> Any:
    """Compile the output of queries that read all keys; a task is one item."""
    lanes, kind, zero = element(dtype)
    phi = MAPS[phi_name].number

    @compiled(f"whole {dtype} {phi_name}", WHOLE_RECORD)
    def whole(first: int, last: int, frames: Any) -> int:
        f = frames[0]
        n, n_q, d, m, d_v = f.n, f.n_q, f.d, f.m, f.d_v
        k_as, v_as = stored_as(f.stored, KEYS), stored_as(f.stored, VALUES)
        q_as, out_as = stored_as(f.stored, QUERIES), stored_as(f.stored, OUTPUT)
        depth = d + 1  # the last number of a key is −h|k|²
        width, _, stride, d_in, d_out = widths_of(m, d, d_v, lanes)
        many, several = n > ROWS, d_out > PANEL_VECTORS * lanes  # blocks of keys; panels of the numerator
        has_W = phi != ELU
        sizes = (
            *(lanes, stride, stride, stride, stride, max(stride, d_out), d_in, d_in, READ_ROWS, READ_ROWS),
            *(stride * d_out, stride * d_out if many else 0, m * d_out if several else 0),
            *(depth * width if has_W else 0, d * width if has_W else 0),
            *(ROWS * d_out, ROWS * stride, ROWS * depth, READ_ROWS * max(d_out, lanes)),
        )
        buffer, places = np.empty(room(sizes), kind), np.empty(ROWS, np.int64)
        (
            edge, shift, new, k_sum, block_sum, nothing, center, q_center, seen, level,
            kv, block_kv, kv_panels, packed, q_packed, values, x, rows, result,
        ) = cut(buffer, sizes)  # fmt: skip
        clear(nothing, max(stride, d_out))
        clear(x, ROWS * stride)
        clear(center, d_in)
        clear(q_center, d_in)
        directions, q_directions = Panels(packed, depth), Panels(q_packed, d)
        phi_rows, state, scratch = rows_at(x, stride), State(shift, k_sum), Scratch(rows, nothing, edge)
        sums = Sums(shift, k_sum, kv, new, block_sum, block_kv, phi_rows, Panels(values, ROWS), places)
        reading, numerator = Reading(phi_rows, result, seen, level), Panels(kv_panels if several else kv, m)

        packed_W = packed_q_W = -1  # which directions are in scratch: often those of the item before
        for item in range(first, last):
            f = frames[item]
            numbers, q_numbers = pointer(f.numbers, zero), pointer(f.q_numbers, zero)
            load_center(f, d, lanes, center, zero)
            if f.q_center != 0:
                load_padded_row(pointer(f.q_center, zero), 0, d, lanes, q_center)
            if has_W and (packed_W != f.W or packed_q_W != f.q_W):
                packed_W, packed_q_W = f.W, f.q_W
                pack_keys(directions_of(f, zero), d, m, numbers[0], lanes, directions)
                U = Matrix(pointer(f.q_W, zero), f.q_W_row, f.q_W_column)
                pack(U, d, m, q_numbers[0], lanes, q_directions)
            k, v = rows_at(pointer(f.x, zero), f.x_row), rows_at(pointer(f.v, zero), f.v_row)
            keys, mask = Side(d, center, numbers, directions, width), pointer(f.mask, np.uint8(0))
            sum_rows(k, k_as, v, v_as, d_v, mask, f.mask != 0, 0, n, keys, m, sums, scratch, lanes, phi)

            for i in range(width):  # as a state that is read: see `blocks.load_start`
                if i >= m:
                    shift[i] = -float("inf")
                    k_sum[i] = 0
                elif shift[i] == -float("inf"):
                    shift[i] = 0
            if several:
                pack(rows_at(kv, d_out), m, d_v, 1, lanes, numerator)
            q, out = rows_at(pointer(f.q_x, zero), f.q_x_row), pointer(f.out, zero)
            queries = Side(d, q_center, q_numbers, q_directions, width)
            read_rows(
                q, q_as, 0, n_q, n_q, f.q_center != 0, queries, state, numerator, m, out, out_as, d_v, reading,
                scratch, lanes, phi,
            )  # fmt: skip
        return DONE

    return whole
