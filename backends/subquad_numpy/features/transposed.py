"""Blocks of causal attention through features, with rows as lanes: x is (m, rows of a block), as wide as one panel.

With one row per lane, a sum over features needs no shuffles, and such a matrix can be the second factor of a product
without packing.
"""

from typing import Any, NamedTuple

from subquad_numpy.codegen import at_least, inline, load, spread, store, zeros
from subquad_numpy.codegen.copies import clear, load_part
from subquad_numpy.codegen.matmul import TILE_ROWS, Panels, multiply, padded, rows_at, turned
from subquad_numpy.codegen.vector_math import LEAST, exp_negative
from subquad_numpy.features.phi import ELU, log_of, times_value


class Block(NamedTuple):
    """What is common to the matrices of a block."""

    rows: int  # as many as a panel has columns
    lanes: int
    nothing: Any  # zeros
    edge: Any  # one vector


@inline
def product(a: Any, rows: int, b: Any, depth: int, c: Any, block: Any) -> None:
    """C = A B, where B has rows as lanes."""
    zero, target = rows_at(block.nothing, 0), rows_at(c, block.rows)
    multiply(a, rows, Panels(b, depth), depth, block.rows, block.lanes, zero, target)


@inline
def add_product(a: Any, rows: int, b: Any, depth: int, c: Any, block: Any) -> None:
    """C += A B, where B has rows as lanes."""
    target = rows_at(c, block.rows)
    multiply(a, rows, Panels(b, depth), depth, block.rows, block.lanes, target, target)


@inline
def load_directions(W: Any, d: int, m: int, factor: Any, target: Any) -> None:
    """Copy factor W turned, (m, d + 1); the last column is of ones, against −h|k|²."""
    for i in range(m):
        for p in range(d):
            target[i * (d + 1) + p] = W.data[p * W.row + i * W.column] * factor
        target[i * (d + 1) + d] = 1


@inline
def rows_to_lanes(source: Any, count: int, width: int, mask: Any, has_mask: bool, target: Any, block: Any) -> None:
    """Copy rows; hidden ones and those from `count` on are 0."""
    clear(target, width * block.rows)
    for r in range(count):
        if not has_mask or mask[r] != 0:
            for p in range(0, width, block.lanes):
                value = load_part(source.data, r * source.row + p, width - p, block.lanes, block.edge)
                store(block.edge, 0, value)
                for lane in range(min(block.lanes, width - p)):
                    target[(p + lane) * block.rows + r] = block.edge[lane]


@inline
def lanes_to_rows(source: Any, count: int, width: int, target: Any, block: Any) -> None:
    """Copy rows into a contiguous array."""
    for r in range(count):
        for p in range(width):
            target[r * width + p] = source[p * block.rows + r]


@inline
def exponents(rows: Any, directions: Any, d: int, height: int, factor: Any, phi: int, x: Any, block: Any) -> None:
    """x of rows of d + 1 numbers; without W it is log φ of factor · rows, which take the place of the rows."""
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
    """The gradient by the rows, of d + 1 numbers, from that by x."""
    if phi == ELU:
        for i in range(0, d * block.rows, block.lanes):
            store(by_rows, i, load(by_x, i) * factor)
    else:
        product(turned(rows_at(directions, d + 1)), padded(d + 1, TILE_ROWS), by_x, m, by_rows, block)


@inline
def hide(x: Any, keys: Any, m: int, count: int, mask: Any, has_mask: bool, phi: int, block: Any) -> None:
    """φ = 0 of keys that the mask hides and of those from `count` on."""
    for r in range(block.rows):
        if r >= count or (has_mask and mask[r] == 0):
            for i in range(m):
                x[i * block.rows + r] = -float("inf")
                if phi == ELU:
                    keys[i * block.rows + r] = 0


@inline
def choose_reference(shift: Any, x: Any, m: int, stride: int, block: Any, reference: Any, opposite: Any) -> bool:
    """ρ, the state's shift, or the first key's exponents where there was no key; −ρ; and whether there was none."""
    empty = True
    for i in range(stride):
        reference[i] = -float("inf")
        if i < m:
            known = shift[i] != -float("inf")
            empty = empty and not known
            start = shift[i] if known else x[i * block.rows]
            reference[i] = start if start != -float("inf") else 0
        opposite[i] = -reference[i]
    return empty


@inline
def largest_exponents(x: Any, offset: Any, m: int, top: Any, block: Any) -> None:
    """max_m (x + offset) of each row."""
    for j in range(0, block.rows, block.lanes):
        most = zeros(x) - float("inf")
        for i in range(m):
            most = at_least(load(x, i * block.rows + j) + spread(offset, i), most)
        store(top, j, most)


@inline
def features(x: Any, above: Any, offset: Any, top: Any, m: int, phi: int, target: Any, block: Any) -> None:
    """φ = value · exp(x + offset − top), for exponents that are not above 0; `above` is what the value is made of."""
    for j in range(0, block.rows, block.lanes):
        most = load(top, j)
        most = at_least(most, LEAST(most))
        for i in range(m):
            e = exp_negative((load(x, i * block.rows + j) + spread(offset, i)) - most)
            store(target, i * block.rows + j, times_value(e, load(above, i * block.rows + j), phi))
