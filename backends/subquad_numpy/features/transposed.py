"""Blocks of causal attention through features, with rows as lanes: x is (m, block), as wide as one panel.

Sums over features need nothing of neighbouring lanes, and a product takes any of these as its second factor unpacked.
"""

from typing import Any

from subquad_numpy.codegen import at_least, inline, load, spread, store, zeros
from subquad_numpy.codegen.copies import clear, load_part
from subquad_numpy.codegen.matmul import TILE_ROWS, multiply, padded
from subquad_numpy.codegen.vector_math import LEAST, exp_negative
from subquad_numpy.features.phi import log_of, times_value


@inline
def product(
    a: Any, a_row: int, a_step: int, rows: int, b: Any, depth: int, lanes: int, nothing: Any, c: Any, block: int
) -> None:
    """C = A B, where B has rows as lanes."""
    multiply(a, a_row, a_step, rows, b, depth, depth, block, lanes, nothing, 0, c, block)


@inline
def add_product(a: Any, a_row: int, a_step: int, rows: int, b: Any, depth: int, lanes: int, c: Any, block: int) -> None:
    """C += A B."""
    multiply(a, a_row, a_step, rows, b, depth, depth, block, lanes, c, block, c, block)


@inline
def load_directions(W: Any, W_row: int, W_column: int, d: int, m: int, factor: Any, turned: Any) -> None:
    """Copy factor W turned, (m, d + 1); the last column is of ones, against −h|k|²."""
    for i in range(m):
        for p in range(d):
            turned[i * (d + 1) + p] = W[p * W_row + i * W_column] * factor
        turned[i * (d + 1) + d] = 1


@inline
def rows_to_lanes(
    source: Any, step: int, count: int, width: int, mask: Any, has_mask: bool, lanes: int, edge: Any, target: Any,
    block: int,
) -> None:  # fmt: skip
    """Copy rows; hidden ones and those from `count` on are 0."""
    clear(target, width * block)
    for r in range(count):
        if not has_mask or mask[r] != 0:
            for p in range(0, width, lanes):
                store(edge, 0, load_part(source, r * step + p, width - p, lanes, edge))
                for lane in range(min(lanes, width - p)):
                    target[(p + lane) * block + r] = edge[lane]


@inline
def lanes_to_rows(source: Any, count: int, width: int, target: Any, block: int) -> None:
    """Copy rows into a contiguous array."""
    for r in range(count):
        for p in range(width):
            target[r * width + p] = source[p * block + r]


@inline
def exponents(
    rows: Any, turned: Any, d: int, height: int, factor: Any, nothing: Any, lanes: int, elu: bool, x: Any, block: int
) -> None:
    """x of rows of d + 1 numbers; without W it is log φ of factor · rows, which take the place of the rows."""
    if elu:
        for i in range(0, d * block, lanes):
            store(rows, i, load(rows, i) * factor)
            store(x, i, log_of(load(rows, i), elu))
    else:
        product(turned, d + 1, 1, height, rows, d + 1, lanes, nothing, x, block)


@inline
def through_directions(
    by_x: Any, turned: Any, d: int, m: int, factor: Any, nothing: Any, lanes: int, elu: bool, by_rows: Any, block: int
) -> None:
    """The gradient by the rows, of d + 1 numbers, from that by x."""
    if elu:
        for i in range(0, d * block, lanes):
            store(by_rows, i, load(by_x, i) * factor)
    else:
        product(turned, 1, d + 1, padded(d + 1, TILE_ROWS), by_x, m, lanes, nothing, by_rows, block)


@inline
def hide(x: Any, keys: Any, m: int, count: int, mask: Any, has_mask: bool, elu: bool, block: int) -> None:
    """φ = 0 of keys that the mask hides and of those from `count` on."""
    for r in range(block):
        if r >= count or (has_mask and mask[r] == 0):
            for i in range(m):
                x[i * block + r] = -float("inf")
                if elu:
                    keys[i * block + r] = 0


@inline
def choose_reference(shift: Any, x: Any, m: int, stride: int, block: int, reference: Any, opposite: Any) -> bool:
    """ρ, the state's shift, or the first key's exponents where there was no key; −ρ; and whether there was none."""
    empty = True
    for i in range(stride):
        reference[i] = -float("inf")
        if i < m:
            known = shift[i] != -float("inf")
            empty = empty and not known
            start = shift[i] if known else x[i * block]
            reference[i] = start if start != -float("inf") else 0
        opposite[i] = -reference[i]
    return empty


@inline
def largest_exponents(x: Any, offset: Any, m: int, lanes: int, top: Any, block: int) -> None:
    """max_m (x + offset) of each row."""
    for j in range(0, block, lanes):
        most = zeros(x) - float("inf")
        for i in range(m):
            most = at_least(load(x, i * block + j) + spread(offset, i), most)
        store(top, j, most)


@inline
def features(x: Any, above: Any, offset: Any, top: Any, m: int, lanes: int, elu: bool, phi: Any, block: int) -> None:
    """φ = value · exp(x + offset − top), for exponents that are not above 0; `above` is what the value is made of."""
    for j in range(0, block, lanes):
        most = load(top, j)
        most = at_least(most, LEAST(most))
        for i in range(m):
            e = exp_negative((load(x, i * block + j) + spread(offset, i)) - most)
            store(phi, i * block + j, times_value(e, load(above, i * block + j), elu))
