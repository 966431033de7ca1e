"""The weights of sampled rows: sums of their squares, and keys and values asked for before they are needed."""

from typing import Any, NamedTuple

from subquad_numpy.block_attention.tiles import KEYS
from subquad_numpy.codegen import apart, load, store
from subquad_numpy.codegen.side_by_side import exp_negative
from subquad_numpy.codegen.stored import prefetch_stored


class Ahead(NamedTuple):
    """Rows of a matrix that are read next: `step` and `width` in numbers."""

    data: Any
    stored: int
    first: int
    step: int
    width: int


@apart
def weigh(
    x: Any, columns: int, many: int, top: Any, fade: Any, seen: Any, twice: Any, parts: int, k: Any, v: Any, line: int
) -> None:
    """Turn the logits of a vector of rows into weights exp(x − top), and add them and their squares to the sums so far.

    Few rows read all keys and values from memory. Each step asks for lines of the next ones, which so come while the
    processor computes; asked for all at once, they would be waited for. Of `parts` vectors of rows, each asks for
    its share of the rows, however `many` keys it sees. `line` is the numbers of a cache line.
    """
    along, squares = load(seen, 0) * fade, load(twice, 0) * (fade * fade)
    for row in range(-(-KEYS // parts)):
        for p in range(0, k.width, line):
            prefetch_stored(k.data, k.stored, k.first + row * k.step + p)
        for p in range(0, v.width, line):
            prefetch_stored(v.data, v.stored, v.first + row * v.step + p)
        begin, end = row * parts, min((row + 1) * parts, many)
        for t in range(begin, end - 1, 2):
            one, other = exp_negative((load(x, t * columns) - top, load(x, (t + 1) * columns) - top))
            store(x, t * columns, one)
            store(x, (t + 1) * columns, other)
            along, squares = along + (one + other), squares + (one * one + other * other)
        if begin < end and (end - begin) % 2 != 0:
            (one,) = exp_negative((load(x, (end - 1) * columns) - top,))
            store(x, (end - 1) * columns, one)
            along, squares = along + one, squares + one * one
    store(seen, 0, along)
    store(twice, 0, squares)
