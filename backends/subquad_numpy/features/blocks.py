"""What the kernels of attention through features share: what they are told, and what they do with a block of rows.

    φ_k[j] = exp(x[j] − shift),  S = Σ_j φ_k[j] v[j]ᵀ,  s = Σ_j φ_k[j],     x[j] = k[j] W − h |k[j]|²
    φ_q[i] = exp(y[i]),  D[i] = φ_q[i]ᵀ s,  out[i] = φ_q[i]ᵀ S / D[i],     y[i] = q[i] W + start

of rows less their center. With random directions W this is FAVOR+; linear attention has x and y without a matrix and
features elu(y) + 1, see `phi`. First keys are summed (`summarize`), then queries read the sums (`attend`); of the
gradient queries come first (`attend_gradient`), then keys (`summarize_gradient`). The shift cancels in out, so it counts as
a constant. No exponent ever leaves the cache of its core: all go block by block, product, exponential, product.
"""

from typing import Any

from subquad_numpy.codegen import at_least, inline, largest, load, pointer, store, total, zeros
from subquad_numpy.codegen.copies import load_padded_row, load_part, store_part
from subquad_numpy.codegen.matmul import TILE_ROWS, multiply, pack, padded, panel_at
from subquad_numpy.codegen.vector_math import LEAST, exp_negative
from subquad_numpy.features.phi import log_after, times_value
from subquad_numpy.runtime.arguments import Fields

# elements from row to row, of W also from column to column
SIDE: Fields = dict.fromkeys(("x_row", "W_row", "W_column"))
# queries or keys, directions, center; numbers are (factor of W, or of x without W; h)
SIDE |= {"x": 2, "W": 2, "center": 1, "numbers": 1}

# rows of an item, their numbers, features, numbers of a value; a task is one of so many chunks of so many rows
HEAD: Fields = dict.fromkeys(("n", "d", "m", "d_v", "chunks", "chunk")) | SIDE
"""What every kernel is told of an item: see `runtime.arguments` for what a record type is."""

OF_KEYS: Fields = {"v_row": None, "v": 2, "mask": 1}  # the mask is of bytes
# without start it is 0, without k_sum 1; `is_shift`: a start of −∞ stands for a feature without a key, and is 0
OF_QUERIES: Fields = {"kv_row": None, "is_shift": None, "start": 2, "kv": 2, "k_sum": 2}


@inline
def sizes_of(f: Any) -> Any:
    """The words of `HEAD` before `SIDE`."""
    return f.n, f.d, f.m, f.d_v, f.chunks, f.chunk


@inline
def widths_of(m: int, d: int, d_v: int, lanes: int) -> tuple[int, int, int, int, int]:
    """Features in whole vectors, also in whole tiles, and in both; numbers of a row and of a value in whole vectors."""
    width = padded(m, lanes)
    height = padded(width, TILE_ROWS)
    return width, height, padded(height, lanes), padded(d, lanes), padded(d_v, lanes)


@inline
def load_center(f: Any, d: int, lanes: int, center: Any, zero: Any) -> None:
    """Copy the item's center, if any."""
    if f.center != 0:
        load_padded_row(pointer(f.center, zero), 0, d, lanes, center)


@inline
def into_panels(panels: Any, panel_rows: int, row: int, column: int, width: int, value: Any, lanes: int) -> None:
    """Store a vector of one row of a matrix B as `multiply` reads it: panels of `panel_rows` rows."""
    first, columns = panel_at(column, width, lanes)
    store(panels, first * panel_rows + row * columns + column - first, value)


@inline
def visible_rows(mask: Any, has_mask: bool, row: int, stop: int, most: int, places: Any) -> tuple[int, int]:
    """Write the places of the next rows that the mask shows, at most so many; their number, and the row behind."""
    count = 0
    while row < stop and count < most:
        if not has_mask or mask[row] != 0:
            places[count] = row
            count += 1
        row += 1
    return count, row


@inline
def pack_keys(W: Any, W_row: int, W_column: int, d: int, m: int, factor: Any, lanes: int, packed: Any) -> None:
    """W for `key_exponents`: below its d rows one of ones, against −h|k|²."""
    pack(W, W_row, W_column, d, m, factor, lanes, packed, d + 1)
    for i in range(0, m, lanes):
        into_panels(packed, d + 1, d, i, padded(m, lanes), zeros(packed) + 1.0, lanes)


@inline
def key_exponents(
    k: Any, k_row: int, places: Any, count: int, d: int, center: Any, numbers: Any, packed: Any, nothing: Any,
    width: int, lanes: int, edge: Any, elu: bool, rows: Any, x: Any, stride: int,
) -> None:  # fmt: skip
    """x of a block of keys; with W they stay in `rows`, d + 1 numbers each."""
    depth = d + 1
    for r in range(count):
        square = zeros(rows)
        for p in range(0, d, lanes):
            part = load_part(k, places[r] * k_row + p, d - p, lanes, edge) - load(center, p)
            if elu:
                store(x, r * stride + p, part * numbers[0])
            else:
                square = square + part * part
                store_part(rows, r * depth + p, part, d - p, lanes, edge)
        # |k|² overflows long before k itself, and 0 · ∞ is NaN
        rows[r * depth + d] = -numbers[1] * total(square) if numbers[1] != 0 else 0
    if not elu:
        whole = padded(count, TILE_ROWS)
        for i in range(count * depth, whole * depth):
            rows[i] = 0
        multiply(rows, depth, 1, whole, packed, depth, depth, width, lanes, nothing, 0, x, stride)


@inline
def query_exponents(
    q: Any, q_row: int, count: int, d: int, center: Any, numbers: Any, packed: Any, start: Any,
    width: int, lanes: int, edge: Any, elu: bool, rows: Any, y: Any, stride: int,
) -> None:  # fmt: skip
    """y of a block of queries; with W they stay in `rows`, d numbers each. Without W it does not begin with `start`."""
    for r in range(count):
        for p in range(0, d, lanes):
            part = load_part(q, r * q_row + p, d - p, lanes, edge) - load(center, p)
            if elu:
                store(y, r * stride + p, part * numbers[0])
            else:
                store_part(rows, r * d + p, part, d - p, lanes, edge)
    if not elu:
        whole = padded(count, TILE_ROWS)
        for i in range(count * d, whole * d):
            rows[i] = 0
        multiply(rows, d, 1, whole, packed, d, d, width, lanes, start, 0, y, stride)


@inline
def query_features(
    y: Any, stride: int, count: int, start: Any, k_sum: Any, width: int, lanes: int, elu: bool, seen: Any, level: Any
) -> None:
    """φ of each row over exp(level), its largest exponential, in place of y; and φᵀ s."""
    for r in range(count):
        top = log_after(load(y, r * stride), start, 0, elu)
        for i in range(lanes, width, lanes):
            top = at_least(log_after(load(y, r * stride + i), start, i, elu), top)
        highest = largest(at_least(top, LEAST(top)))
        level[r] = highest
        along = zeros(y)
        for i in range(0, width, lanes):
            part = load(y, r * stride + i)
            e = times_value(exp_negative(log_after(part, start, i, elu) - highest), part, elu)
            store(y, r * stride + i, e)
            along = along + e * load(k_sum, i)
        seen[r] = total(along)


@inline
def add_product(
    a: Any, a_row: int, height: int, panels: Any, panel_rows: int, depth: int, width: int, lanes: int, nothing: Any,
    part: Any, c: Any,
) -> None:  # fmt: skip
    """C += Aᵀ B over the rows of a block; the block's own sum comes first, which keeps a float32 sum of many exact."""
    multiply(a, 1, a_row, height, panels, panel_rows, depth, width, lanes, nothing, 0, part, width)
    for i in range(0, height * width, lanes):
        store(c, i, load(c, i) + load(part, i))


@inline
def store_rows(
    target: Any, place: int, rows: int, columns: int, source: Any, width: int, lanes: int, edge: Any
) -> None:
    """Copy rows of scratch memory into a contiguous array."""
    for r in range(rows):
        for j in range(0, columns, lanes):
            store_part(target, place + r * columns + j, load(source, r * width + j), columns - j, lanes, edge)


@inline
def load_start(f: Any, m: int, width: int, zero: Any, start: Any, k_sum: Any) -> None:
    """Copy the item's start and s; beyond its features nothing is seen."""
    starts, sums = pointer(f.start, zero), pointer(f.k_sum, zero)
    for i in range(width):
        start[i] = -float("inf")
        k_sum[i] = 0
        if i < m:
            start[i] = starts[i] if f.start != 0 else 0
            if f.is_shift != 0 and start[i] == -float("inf"):
                start[i] = 0
            k_sum[i] = sums[i] if f.k_sum != 0 else 1
