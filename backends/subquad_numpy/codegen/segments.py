"""Means of m consecutive segments of n rows, of which the first n mod m have one row more than the others."""

from typing import Any

from subquad_numpy.codegen.copies import load_part, store_part
from subquad_numpy.codegen.pointers import load, store, zeros
from subquad_numpy.codegen.stored import load_stored, load_stored_part
from subquad_numpy.codegen.vector_type import apart, inline

ROWS = 32  # whose sum is added to the others at once: sums of many rows stay exact
TOGETHER = 4  # vectors of a row that are added at once: memory is read in its order


@inline
def _segment_of(r: int, length: int, longer: int) -> int:
    """The segment of row r."""
    first = longer * (length + 1)  # row of the other segments
    return r // (length + 1) if r < first else longer + (r - first) // length


@inline
def first_row(s: int, n: int, m: int) -> int:
    """The first row of segment s; n for s = m."""
    return s * (n // m) + min(s, n % m)


@apart
def add_means(
    x: Any, stored: int, row: int, n: int, d: int, m: int, begin: int, end: int, means: Any, lanes: int, edge: Any
) -> None:  # fmt: skip
    """Add the share of rows begin … end − 1, at least one, to the means (m, d) of the segments of n ≥ m rows.

    Each row has its weight before it is added: no sum overflows. `row` is the distance of two rows, `edge` scratch
    memory for a vector.
    """
    length, longer = n // m, n % m
    for s in range(_segment_of(begin, length, longer), _segment_of(end - 1, length, longer) + 1):
        first, many = first_row(s, n, m), length + 1 if s < longer else length
        low, high, weight, together = max(first, begin), min(first + many, end), 1.0 / many, 0
        for c in range(0, d - TOGETHER * lanes + 1, TOGETHER * lanes):
            together, out = c + TOGETHER * lanes, s * d + c
            for start in range(low, high, ROWS):
                one, two, three, four = zeros(means), zeros(means), zeros(means), zeros(means)
                for r in range(start, min(start + ROWS, high)):
                    at = r * row + c
                    one = one + load_stored(x, stored, at) * weight
                    two = two + load_stored(x, stored, at + lanes) * weight
                    three = three + load_stored(x, stored, at + 2 * lanes) * weight
                    four = four + load_stored(x, stored, at + 3 * lanes) * weight
                store(means, out, load(means, out) + one)
                store(means, out + lanes, load(means, out + lanes) + two)
                store(means, out + 2 * lanes, load(means, out + 2 * lanes) + three)
                store(means, out + 3 * lanes, load(means, out + 3 * lanes) + four)
        for c in range(together, d, lanes):
            out = s * d + c
            for start in range(low, high, ROWS):
                some = zeros(means)
                for r in range(start, min(start + ROWS, high)):
                    some = some + load_stored_part(x, stored, r * row + c, d - c, lanes, edge) * weight
                store_part(means, out, load_part(means, out, d - c, lanes, edge) + some, d - c, lanes, edge)
