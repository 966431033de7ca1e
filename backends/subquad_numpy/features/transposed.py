"""Blocks of causal attention through features, transposed: x is (m, rows of a block), as wide as one panel.

With one row of the block per lane, a sum over features needs no shuffles, and such a matrix can be the right factor of
a product without packing. "Rows" here are queries or keys, d + 1 numbers each, of which the last is for −h|k|².
"""

from typing import Any, NamedTuple

from subquad_numpy.codegen import at_least, inline, load, prefetch, shifted, spread, store, total, zeros
from subquad_numpy.codegen.copies import turn
from subquad_numpy.codegen.matmul import TILE_ROWS, Panels, multiply, padded, rows_at, turned
from subquad_numpy.codegen.vector_math import LEAST, exp_negative
from subquad_numpy.features.phi import ELU, log_of, times_value


class Block(NamedTuple):
    """Size and scratch memory of a block."""

    rows: int  # the number of columns of a panel
    lanes: int
    nothing: Any  # a row of zeros
    edge: Any  # one vector, for the ends of rows


class Asked(NamedTuple):
    """Rows of a later block, whose cache lines are asked for while features of this block are computed."""

    memory: Any
    step: int  # from row to row
    rows: int
    width: int


@inline
def ask_next(asked: Any, row: int, column: int, lanes: int) -> tuple[int, int]:
    """Ask for the cache line of a place in the rows, if there is such a row; returns the place of the next line."""
    if row < asked.rows:
        prefetch(asked.memory, row * asked.step + column)
        column += lanes
        if column >= asked.width:
            row, column = row + 1, 0
    return row, column


@inline
def product(a: Any, rows: int, b: Any, depth: int, c: Any, block: Any) -> None:
    """C = A B, where B and C are transposed blocks."""
    zero, target = rows_at(block.nothing, 0), rows_at(c, block.rows)
    multiply(a, rows, Panels(b, depth), depth, block.rows, block.lanes, zero, target)


@inline
def add_product(a: Any, rows: int, b: Any, depth: int, c: Any, block: Any) -> None:
    """C += A B, where B and C are transposed blocks."""
    target = rows_at(c, block.rows)
    multiply(a, rows, Panels(b, depth), depth, block.rows, block.lanes, target, target)


@inline
def load_directions(W: Any, d: int, m: int, factor: Any, target: Any) -> None:
    """Write (factor W)ᵀ as (m, d + 1); the last column is of ones, which meets −h|k|²."""
    for i in range(m):
        for p in range(d):
            target[i * (d + 1) + p] = W.data[p * W.row + i * W.column] * factor
        target[i * (d + 1) + d] = 1


@inline
def rows_to_lanes(source: Any, count: int, width: int, mask: Any, has_mask: bool, target: Any, block: Any) -> None:
    """Copy rows into a transposed block, by tiles; hidden rows, and those from `count` on, are 0."""
    rows, lanes = block.rows, block.lanes
    tiles = width // lanes * lanes
    for r in range(0, rows, lanes):
        turned_columns = tiles if r + lanes <= count else 0
        for p in range(0, turned_columns, lanes):
            tile, to = shifted(source.data, r * source.row + p), shifted(target, p * rows + r)
            turn(tile, tile, source.row, to, to, rows)
        for lane in range(lanes):
            at = r + lane
            if at >= count or (has_mask and mask[at] == 0):
                for p in range(width):
                    target[p * rows + at] = 0
            else:
                for p in range(turned_columns, width):
                    target[p * rows + at] = source.data[at * source.row + p]


@inline
def lanes_to_rows(source: Any, count: int, width: int, target: Any, block: Any) -> None:
    """Copy the first `count` rows of a transposed block into a contiguous array, by tiles."""
    rows, lanes = block.rows, block.lanes
    tiles = width // lanes * lanes
    for r in range(0, count, lanes):
        turned_columns = tiles if r + lanes <= count else 0
        for p in range(0, turned_columns, lanes):
            tile, to = shifted(source, p * rows + r), shifted(target, r * width + p)
            turn(tile, tile, rows, to, to, width)
        for at in range(r, min(count, r + lanes)):
            for p in range(turned_columns, width):
                target[at * width + p] = source[p * rows + at]


@inline
def exponents(rows: Any, directions: Any, d: int, height: int, factor: Any, phi: int, x: Any, block: Any) -> None:
    """Write x of the rows. Without W, the rows are multiplied by the factor in place, and x is log φ of them."""
    if phi == ELU:
        for i in range(0, d * block.rows, block.lanes):
            store(rows, i, load(rows, i) * factor)
            store(x, i, log_of(load(rows, i), phi))
    else:
        product(rows_at(directions, d + 1), height, rows, d + 1, x, block)


@inline
def through_directions(
    by_x: Any, directions: Any, d: int, m: int, factor: Any, phi: int, by_rows: Any, block: Any
) -> None:
    """Write the gradient by the rows, d + 1 numbers each, from the gradient by x."""
    if phi == ELU:
        for i in range(0, d * block.rows, block.lanes):
            store(by_rows, i, load(by_x, i) * factor)
    else:
        product(turned(rows_at(directions, d + 1)), padded(d + 1, TILE_ROWS), by_x, m, by_rows, block)


@inline
def hide(x: Any, keys: Any, m: int, count: int, mask: Any, has_mask: bool, phi: int, block: Any) -> None:
    """Make φ = 0 for keys that the mask hides, and for those from `count` on."""
    for r in range(block.rows):
        if r >= count or (has_mask and mask[r] == 0):
            for i in range(m):
                x[i * block.rows + r] = -float("inf")
                if phi == ELU:
                    keys[i * block.rows + r] = 0


@inline
def choose_reference(shift: Any, x: Any, m: int, stride: int, block: Any, reference: Any, opposite: Any) -> bool:
    """Write the reference ρ of the exponents and −ρ; returns whether the state has no key at all.

    ρ is the state's shift, or the exponent of the block's first key for features without a key so far.
    """
    odd, whole = zeros(x), m // block.lanes * block.lanes
    for i in range(0, whole, block.lanes):
        part = load(shift, i)
        store(reference, i, part)
        odd = odd + (part - part)  # 0 for a known shift, else NaN
    for i in range(whole, stride):
        reference[i] = shift[i] if i < m else -float("inf")
    empty = False
    if whole < m or total(odd) != 0:
        empty = True
        for i in range(m):
            known = shift[i] != -float("inf")
            empty = empty and not known
            start = shift[i] if known else x[i * block.rows]
            reference[i] = start if start != -float("inf") else 0
    for i in range(0, stride, block.lanes):
        store(opposite, i, -load(reference, i))
    return empty


@inline
def largest_exponents(x: Any, offset: Any, m: int, top: Any, block: Any, asked: Any) -> None:
    """Write the maximum over features of x + offset, for each row."""
    row = column = 0
    for j in range(0, block.rows, block.lanes):
        most = zeros(x) - float("inf")
        for i in range(m):
            row, column = ask_next(asked, row, column, block.lanes)
            most = at_least(load(x, i * block.rows + j) + spread(offset, i), most)
        store(top, j, most)


@inline
def features(x: Any, above: Any, offset: Any, top: Any, m: int, phi: int, target: Any, block: Any, asked: Any) -> None:
    """Write φ = value · exp(x + offset − top), whose exponent is ≤ 0; the value is a function of `above`, see `phi`."""
    row = column = 0
    for j in range(0, block.rows, block.lanes):
        most = load(top, j)
        most = at_least(most, LEAST(most))
        for i in range(m):
            row, column = ask_next(asked, row, column, block.lanes)
            e = exp_negative((load(x, i * block.rows + j) + spread(offset, i)) - most)
            store(target, i * block.rows + j, times_value(e, load(above, i * block.rows + j), phi))
