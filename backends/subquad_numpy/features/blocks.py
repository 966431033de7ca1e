"""What the kernels of attention through features share: their argument records, and steps on a block of rows.

    φ_k[j] = exp(x[j] − shift),  S = Σ_j φ_k[j] v[j]ᵀ,  s = Σ_j φ_k[j],     x[j] = k[j] W − h |k[j]|²
    φ_q[i] = exp(y[i]),  D[i] = φ_q[i]ᵀ s,  out[i] = φ_q[i]ᵀ S / D[i],     y[i] = q[i] W + start

where q and k stand for rows less their center. With random directions W this is FAVOR+; linear attention has no W, and
features elu(y) + 1: see `phi`. The forward pass sums the keys (`summarize`), then queries read the sums (`attend`). The
gradient takes the queries first (`attend_gradient`), then the keys (`summarize_gradient`). The shift cancels in out, so
it counts as a constant. A kernel goes block by block through product, exponential and product, so that exponents never
leave the cache of a core.
"""

from typing import Any, NamedTuple

from subquad_numpy.codegen import at_least, inline, largest, load, pointer, spread, store, total, zeros
from subquad_numpy.codegen.copies import load_padded_row, store_part
from subquad_numpy.codegen.matmul import TILE_ROWS, Matrix, into_panels, multiply, pack, padded, rows_at
from subquad_numpy.codegen.side_by_side import exp_negative
from subquad_numpy.codegen.stored import load_stored_part, prefetch_stored
from subquad_numpy.codegen.turn import maxima, totals
from subquad_numpy.codegen.vector_math import LEAST
from subquad_numpy.features.phi import ELU, log_after, times_value
from subquad_numpy.runtime.arguments import Fields

# Fields of queries or of keys:
#     x_row, W_row, W_column    strides in elements, from row to row and from column to column
#     x, W, center              queries or keys (n, d), directions (d, m), center (d)
#     numbers                   [factor, h]; the factor multiplies W, or x where there is no W
SIDE: Fields = dict.fromkeys(("x_row", "W_row", "W_column"))
SIDE |= {"x": 2, "W": 2, "center": 1, "numbers": 1}

# Sizes: rows of an item, numbers of a row, features, numbers of a value; an item has `chunks` chunks of `chunk` rows.
# `stored` says how rows are stored that may have half precision, at the places of `KEYS` …
HEAD: Fields = dict.fromkeys(("n", "d", "m", "d_v", "chunks", "chunk", "stored")) | SIDE
"""The fields that every kernel reads of an item: see `runtime.arguments` for record types."""

KEYS, VALUES, QUERIES, OUTPUT = range(4)  # places in `stored`
OF_KEYS: Fields = {"v_row": None, "v": 2, "mask": 1}  # the mask has one byte for each key
# Address 0 means: start is 0, k_sum is 1. If `is_shift`, start is the shift of a state, where −∞ (no key) counts as 0.
OF_QUERIES: Fields = {"kv_row": None, "is_shift": None, "start": 2, "kv": 2, "k_sum": 2}


@inline
def sizes_of(f: Any) -> Any:
    """The sizes of an argument record: (n, d, m, d_v, chunks, chunk)."""
    return f.n, f.d, f.m, f.d_v, f.chunks, f.chunk


class Side(NamedTuple):
    """Queries or keys in scratch memory: what their exponents are computed from."""

    d: int  # numbers of a row
    center: Any
    numbers: Any  # factor, h
    packed: Any  # panels of W; for keys with one more row, of ones, which meets −h|k|²
    width: int  # m rounded up to whole vectors


class Scratch(NamedTuple):
    """Scratch memory for a block of rows."""

    rows: Any  # rows less their center; a key has d + 1 numbers, a query d
    nothing: Any  # a row of zeros
    edge: Any  # one vector, for the ends of rows


class State(NamedTuple):
    """What queries read of a state beside the numerator: from feature m on, start is −∞ and k_sum is 0."""

    start: Any
    k_sum: Any


@inline
def widths_of(m: int, d: int, d_v: int, lanes: int) -> tuple[int, int, int, int, int]:
    """(width, height, stride, d_in, d_out): sizes rounded up.

    width, height, stride    m rounded up to vectors, then to tiles, then to vectors again
    d_in, d_out              d and d_v rounded up to vectors
    """
    width = padded(m, lanes)
    height = padded(width, TILE_ROWS)
    return width, height, padded(height, lanes), padded(d, lanes), padded(d_v, lanes)


@inline
def load_center(f: Any, d: int, lanes: int, center: Any, zero: Any) -> None:
    """Copy the center of an item's argument record into scratch, if there is one."""
    if f.center != 0:
        load_padded_row(pointer(f.center, zero), 0, d, lanes, center)


@inline
def directions_of(f: Any, zero: Any) -> Any:
    """The matrix W of an item's argument record."""
    return Matrix(pointer(f.W, zero), f.W_row, f.W_column)


@inline
def ask_row(memory: Any, stored: int, index: int, width: int, lanes: int) -> None:
    """Ask for the cache lines of a row of `width` numbers."""
    for p in range(0, width, lanes):
        prefetch_stored(memory, stored, index + p)


@inline
def visible_rows(mask: Any, has_mask: bool, row: int, stop: int, most: int, places: Any) -> tuple[int, int]:
    """Write the numbers of the next rows that the mask shows into `places`, up to `most` of them.

    Returns how many there are, and the first row that was not looked at.
    """
    count = 0
    while row < stop and count < most:
        if not has_mask or mask[row] != 0:
            places[count] = row
            count += 1
        row += 1
    return count, row


@inline
def pack_keys(W: Any, d: int, m: int, factor: Any, lanes: int, packed: Any) -> None:
    """Pack W for `key_exponents`, with a row of ones below its d rows, which meets −h|k|²."""
    pack(W, d, m, factor, lanes, packed)
    for i in range(0, m, lanes):
        into_panels(packed, d, i, padded(m, lanes), zeros(packed.data) + 1.0, lanes)


@inline
def key_exponents(
    k: Any, stored: int, places: Any, count: int, keys: Any, x: Any, scratch: Any, lanes: int, phi: int
) -> None:
    """Write x of the keys at `places`. With W, the keys less their center are left in `scratch.rows`."""
    d, rows, numbers = keys.d, scratch.rows, keys.numbers
    depth = d + 1
    for r in range(count):
        square = zeros(rows)
        for p in range(0, d, lanes):
            part = load_stored_part(k.data, stored, places[r] * k.row + p, d - p, lanes, scratch.edge)
            part = part - load(keys.center, p)
            if phi == ELU:
                store(x.data, r * x.row + p, part * numbers[0])
            else:
                square = square + part * part
                store_part(rows, r * depth + p, part, d - p, lanes, scratch.edge)
        # without h the square is not used: |k|² overflows long before k does, and 0 · ∞ is NaN
        rows[r * depth + d] = -numbers[1] * total(square) if numbers[1] != 0 else 0
    if phi != ELU:
        whole = padded(count, TILE_ROWS)
        for i in range(count * depth, whole * depth):
            rows[i] = 0
        multiply(rows_at(rows, depth), whole, keys.packed, depth, keys.width, lanes, rows_at(scratch.nothing, 0), x)


@inline
def query_exponents(
    q: Any, stored: int, row: int, count: int, queries: Any, start: Any, y: Any, scratch: Any, lanes: int, phi: int
) -> None:
    """Write y of the queries from `row` on. With W, y includes `start`.

    The queries less their center are then left in `scratch.rows`.
    """
    d, rows = queries.d, scratch.rows
    for r in range(count):
        for p in range(0, d, lanes):
            part = load_stored_part(q.data, stored, (row + r) * q.row + p, d - p, lanes, scratch.edge)
            part = part - load(queries.center, p)
            if phi == ELU:
                store(y.data, r * y.row + p, part * queries.numbers[0])
            else:
                store_part(rows, r * d + p, part, d - p, lanes, scratch.edge)
    if phi != ELU:
        whole = padded(count, TILE_ROWS)
        for i in range(count * d, whole * d):
            rows[i] = 0
        multiply(rows_at(rows, d), whole, queries.packed, d, queries.width, lanes, rows_at(start, 0), y)


@inline
def query_features(
    y: Any, count: int, state: Any, width: int, lanes: int, phi: int, seen: Any, level: Any, parts: Any
) -> None:
    """Write φ of each row over exp(level) in place of y; `level` is the row's largest exponent, and `seen` is φᵀ s.

    `parts` is scratch memory, a vector for each row: lanes of as many rows as a vector has join at once.
    """
    full = count // lanes * lanes
    for r in range(count):
        top = log_after(load(y.data, r * y.row), state.start, 0, phi)
        for i in range(lanes, width, lanes):
            top = at_least(log_after(load(y.data, r * y.row + i), state.start, i, phi), top)
        store(parts, r * lanes, at_least(top, LEAST(top)))
    for r in range(0, full, lanes):
        store(level, r, maxima(parts, r * lanes))
    for r in range(full, count):
        level[r] = largest(load(parts, r * lanes))
    for r in range(count):  # a loop of its own: what a row waits for is short, and rows overlap
        highest = spread(level, r)
        along = zeros(y.data)
        for i in range(0, width, lanes):
            part = load(y.data, r * y.row + i)
            (e,) = exp_negative((log_after(part, state.start, i, phi) - highest,))
            e = times_value(e, part, phi)
            store(y.data, r * y.row + i, e)
            along = along + e * load(state.k_sum, i)
        store(parts, r * lanes, along)
    for r in range(0, full, lanes):
        store(seen, r, totals(parts, r * lanes))
    for r in range(full, count):
        seen[r] = total(load(parts, r * lanes))


@inline
def add_product(a: Any, height: int, panels: Any, depth: int, c: Any, part: Any, nothing: Any, lanes: int) -> None:
    """C += A B over the rows of a block. The product is formed apart, in `part`: that rounds less than adding rows."""
    multiply(a, height, panels, depth, c.row, lanes, rows_at(nothing, 0), rows_at(part, c.row))
    for i in range(0, height * c.row, lanes):
        store(c.data, i, load(c.data, i) + load(part, i))


@inline
def store_rows(target: Any, rows: int, columns: int, source: Any, lanes: int, edge: Any) -> None:
    """Copy rows of scratch memory into a contiguous array."""
    for r in range(rows):
        for j in range(0, columns, lanes):
            value = load(source.data, r * source.row + j)
            store_part(target, r * columns + j, value, columns - j, lanes, edge)


@inline
def load_start(f: Any, m: int, width: int, zero: Any, start: Any, k_sum: Any, lanes: int) -> None:
    """Copy start and s of an item's argument record, in the form of `State`."""
    starts, sums = pointer(f.start, zero), pointer(f.k_sum, zero)
    for i in range(0, width, lanes):
        store(start, i, zeros(start))
        store(k_sum, i, zeros(k_sum) + 1.0)
    for i in range(m if f.start != 0 else 0):
        start[i] = 0 if f.is_shift != 0 and starts[i] == -float("inf") else starts[i]
    for i in range(m if f.k_sum != 0 else 0):
        k_sum[i] = sums[i]
    for i in range(m, width):
        start[i] = -float("inf")
        k_sum[i] = 0
