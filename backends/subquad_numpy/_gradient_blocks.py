"""What both halves of the gradient of attention through exponential features do with a block of rows.

    forward:  φ_k[j] = exp(x[j] − shift),  S = Σ_j φ_k[j] v[j]ᵀ,  s = Σ_j φ_k[j],     x[j] = k[j] W − h |k[j]|²
              φ_q[i] = exp(y[i]),  D[i] = φ_q[i]ᵀ s,  out[i] = φ_q[i]ᵀ S / D[i],     y[i] = q[i] W + start

The gradient is fused like the product itself (see `_summary`): queries first (`_query_gradient`), then keys
(`_key_gradient`). The shift cancels in out, so it counts as a constant.
"""

from typing import Any

from subquad_numpy._product import TILE_ROWS, multiply, panel_at
from subquad_numpy._simd import inline, load, store
from subquad_numpy._tile import store_part

ROWS = 8 * TILE_ROWS  # of a block


@inline
def into_panels(panels: Any, row: int, column: int, width: int, value: Any, lanes: int) -> None:
    """Store a vector of one row of a block where a product with the block's rows as depth reads it."""
    first, columns = panel_at(column, width, lanes)
    store(panels, first * ROWS + row * columns + column - first, value)


@inline
def add_product(
    a: Any, a_row: int, height: int, panels: Any, depth: int, width: int, lanes: int, nothing: Any, part: Any, c: Any
) -> None:  # fmt: skip
    """C += Aᵀ B over the rows of a block; the block's own sum comes first, which keeps a float32 sum of many exact."""
    multiply(a, 1, a_row, height, panels, ROWS, depth, width, lanes, nothing, 0, part, width)
    for i in range(0, height * width, lanes):
        store(c, i, load(c, i) + load(part, i))


@inline
def rows_out(target: Any, place: int, rows: int, columns: int, source: Any, width: int, lanes: int, edge: Any) -> None:
    """Copy rows of scratch memory into a contiguous array."""
    for r in range(rows):
        for j in range(0, columns, lanes):
            store_part(target, place + r * columns + j, load(source, r * width + j), columns - j, lanes, edge)
