"""The output of queries that read a state (`summarize`), in attention through exponential features, fused.

    out[i] = exp(y[i])ᵀ S / exp(y[i])ᵀ s

in the letters of `blocks`. With W = k̃ᵀ, S = ṽ, s = 1 this is softmax attention to a small number of keys k̃, the
other half of Nyström attention.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from subquad_numpy.codegen import cut, inline, load, pointer, replace_where_zero, room, shifted, spread, store, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.matmul import PANEL_VECTORS, TILE_ROWS, Matrix, Panels, multiply, pack, padded, rows_at
from subquad_numpy.codegen.stored import store_stored_part, stored_as
from subquad_numpy.features.blocks import (
    HEAD,
    OF_QUERIES,
    OUTPUT,
    QUERIES,
    Scratch,
    Side,
    State,
    directions_of,
    load_center,
    load_start,
    query_exponents,
    query_features,
    sizes_of,
    widths_of,
)
from subquad_numpy.features.phi import ELU, MAPS
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.runtime.stored import AS_COMPUTED

ROWS = 8 * TILE_ROWS  # rows of a block: their exponents for 256 features take 64 kB

ATTEND_RECORD = fields(HEAD, OF_QUERIES, {"out": 2})


class Reading(NamedTuple):
    """What a block of queries needs in scratch memory, with at most ROWS rows."""

    phi_q: Any  # a `Matrix`
    result: Any  # (ROWS, d_out or lanes)
    seen: Any
    level: Any


@inline
def read_rows(
    q: Any, q_as: int, row: int, stop: int, n: int, has_center: bool, queries: Any, state: Any, numerator: Any, m: int,
    out: Any, out_as: int, d_v: int, reading: Any, scratch: Any, lanes: int, phi: int,
) -> None:  # fmt: skip
    """Write the output of the queries from `row` to `stop` of n, which read `state` and its numerator, in panels.

    Queries are read where they lie and products are written where they belong, if that can be: memory is then waited
    for while products are computed, and not by a copy.
    """
    seen, d_out, width, y, start = reading.seen, padded(d_v, lanes), queries.width, reading.phi_q, state.start
    nothing = rows_at(scratch.nothing, 0)
    for first in range(row, stop, ROWS):
        count = min(ROWS, stop - first)
        whole = padded(count, TILE_ROWS)
        if phi != ELU and q_as == AS_COMPUTED and not has_center and first + whole <= n:
            own = rows_at(shifted(q.data, first * q.row), q.row)
            multiply(own, whole, queries.packed, queries.d, width, lanes, rows_at(start, 0), y)
        else:
            query_exponents(q, q_as, first, count, queries, start, y, scratch, lanes, phi)
        query_features(y, count, state, width, lanes, phi, seen, reading.level, reading.result)
        for r in range(0, count, lanes):
            found = load(seen, r)
            # where the state has no key, the row is 0, and stays 0
            store(seen, r, replace_where_zero(found, (zeros(seen) + 1.0) / found, found))
        fits = out_as == AS_COMPUTED and d_v == d_out and count == whole
        product = shifted(out, first * d_v) if fits else reading.result
        multiply(y, whole, numerator, m, d_out, lanes, nothing, rows_at(product, d_out))
        for r in range(count):
            factor = spread(seen, r)
            for j in range(0, d_v, lanes):
                value = load(product, r * d_out + j) * factor
                if fits:
                    store(product, r * d_out + j, value)
                else:
                    store_stored_part(out, out_as, (first + r) * d_v + j, value, d_v - j, lanes, scratch.edge)


@cache
def attend_kernel(dtype: np.dtype[Any], phi_name: str) -> Any:
    """Compile the output of queries; among the tasks of an item the chunk varies fastest."""
    lanes, kind, zero = element(dtype)
    phi = MAPS[phi_name].number

    @compiled(f"attend {dtype} {phi_name}", ATTEND_RECORD)
    def attend(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, d, m, d_v, chunks, chunk = sizes_of(f)
        q_as, out_as = stored_as(f.stored, QUERIES), stored_as(f.stored, OUTPUT)
        width, _, stride, d_in, d_out = widths_of(m, d, d_v, lanes)
        sizes = (
            *(lanes, ROWS, ROWS, width, width, d_out, d_in, d * width, width * d_out),
            *(ROWS * stride, ROWS * max(d_out, lanes), ROWS * d),
        )
        buffer = np.empty(room(sizes), kind)
        edge, seen, level, start, k_sum, nothing, center, packed, kv, y, result, rows = cut(buffer, sizes)
        clear(nothing, d_out)
        clear(center, d_in)
        clear(y, ROWS * stride)
        directions, numerator, state = Panels(packed, d), Panels(kv, m), State(start, k_sum)
        reading, scratch = Reading(rows_at(y, stride), result, seen, level), Scratch(rows, nothing, edge)

        packed_for = -1  # the item whose directions and state are in scratch: often that of the task before
        for task in range(first, last):
            item = task // chunks
            f = records[item]
            q, q_row, numbers, out = pointer(f.x, zero), f.x_row, pointer(f.numbers, zero), pointer(f.out, zero)
            if packed_for != item:
                packed_for = item
                load_center(f, d, lanes, center, zero)
                if phi != ELU:
                    pack(directions_of(f, zero), d, m, numbers[0], lanes, directions)
                values = pointer(f.kv, zero)
                is_panel = f.kv_row == d_v == d_out <= PANEL_VECTORS * lanes  # which is read where it lies
                numerator = Panels(values if is_panel else kv, m)
                if not is_panel:
                    pack(Matrix(values, f.kv_row, 1), m, d_v, 1, lanes, numerator)
                load_start(f, m, width, zero, start, k_sum, lanes)
            queries = Side(d, center, numbers, directions, width)

            row = task % chunks * chunk
            read_rows(
                rows_at(q, q_row), q_as, row, min(n, row + chunk), n, f.center != 0, queries, state, numerator, m,
                out, out_as, d_v, reading, scratch, lanes, phi,
            )  # fmt: skip
        return DONE

    return attend
