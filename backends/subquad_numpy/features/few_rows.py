"""The product of a few rows with a matrix in panels: by tiles, of which one or two rows would fill only a part."""

from typing import Any

from subquad_numpy.codegen import inline, load, shifted, spread, store, zeros
from subquad_numpy.codegen.matmul import PANEL_VECTORS, TILE_ROWS, multiply, padded, panel_at, place_in, rows_at

BESIDE = 4  # vectors of a row that are computed side by side


@inline
def multiply_few(
    rows: Any, row: int, count: int, W: Any, d: int, width: int, lanes: int, nothing: Any, y: Any
) -> None:  # fmt: skip
    """Write Y = R W for `count` rows R of d numbers, which lie `row` apart, and panels W; `nothing` is a row of zeros.

    There is memory for rows of whole tiles, of R and of Y.
    """
    if count > 2:
        whole = padded(count, TILE_ROWS)
        multiply(rows_at(rows, row), whole, W, d, width, lanes, rows_at(nothing, 0), rows_at(y, width))
        return
    side, step = BESIDE * lanes, PANEL_VECTORS * lanes
    for r in range(count):
        source, target = shifted(rows, r * row), shifted(y, r * width)
        for i in range(0, width // side * side, side):
            a, b = shifted(W.data, place_in(W, 0, i, width, lanes)), place_in(W, 0, i + lanes, width, lanes)
            c, e = place_in(W, 0, i + 2 * lanes, width, lanes), place_in(W, 0, i + 3 * lanes, width, lanes)
            b, c, e = shifted(W.data, b), shifted(W.data, c), shifted(W.data, e)
            sum_0, sum_1, sum_2, sum_3 = zeros(rows), zeros(rows), zeros(rows), zeros(rows)
            for p in range(d):
                x = spread(source, p)
                sum_0 = sum_0 + x * load(a, p * step)
                sum_1 = sum_1 + x * load(b, p * step)
                sum_2 = sum_2 + x * load(c, p * step)
                sum_3 = sum_3 + x * load(e, p * step)
            store(target, i, sum_0)
            store(target, i + lanes, sum_1)
            store(target, i + 2 * lanes, sum_2)
            store(target, i + 3 * lanes, sum_3)
        for i in range(width // side * side, width, lanes):
            _, columns = panel_at(i, width, lanes)
            along, part = zeros(rows), shifted(W.data, place_in(W, 0, i, width, lanes))
            for p in range(d):
                along = along + spread(source, p) * load(part, p * columns)
            store(target, i, along)
