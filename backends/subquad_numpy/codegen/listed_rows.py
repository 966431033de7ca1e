"""Products of a few rows of a matrix, listed by their numbers, with a matrix that is read in place.

Few rows are padded to a tile by the last of them: it is computed, and written, again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from subquad_numpy.codegen import Vector, inline, intrinsic, shifted, types
from subquad_numpy.codegen.matmul import PANEL_VECTORS, TILE_ROWS, emit_tile, number

SHORT_ROWS = TILE_ROWS // 2


@cache
def _tile(vectors: int, height: int, adds: bool) -> Callable[..., Any]:
    """The intrinsic C[r, :] = A[names[r], :] B, or with `adds` C[names[r], :] += A[r, :] B, for rows r < many."""

    @intrinsic
    def tile(
        a: Any, a_row: Any, b: Any, b_row: Any, depth: Any, names: Any, many: Any, nothing: Any, c: Any,
        c_row: Any,
    ) -> Any:  # fmt: skip
        vector = Vector(a.dtype)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            a, a_row, b, b_row, depth, names, many, nothing, c, c_row = args
            last = builder.sub(many, number(1))
            by_number, by_name = [], []
            for r in range(height):
                at = builder.select(builder.icmp_signed("<", number(r), last), number(r), last)
                by_number.append(at)
                by_name.append(builder.sext(builder.load(builder.gep(names, [at])), number(0).type))

            def rows_of(memory: Any, stride: Any, indices: list[Any]) -> list[Any]:
                return [builder.gep(memory, [builder.mul(stride, index)]) for index in indices]

            left = rows_of(a, a_row, by_number if adds else by_name)
            right = rows_of(c, c_row, by_name if adds else by_number)
            start = right if adds else [nothing] * height
            emit_tile(context, builder, vector, vectors, number(1), b, b_row, depth, left, start, right)
            return context.get_dummy_value()

        word = types.intp
        return types.none(a, word, b, word, word, names, word, nothing, c, word), codegen

    return tile


@cache
def _product(adds: bool) -> Callable[..., Any]:
    """The products by tiles; few rows take half of one, and the last columns one vector."""
    tile, last_tile = _tile(PANEL_VECTORS, TILE_ROWS, adds), _tile(1, TILE_ROWS, adds)
    short_tile, last_short_tile = _tile(PANEL_VECTORS, SHORT_ROWS, adds), _tile(1, SHORT_ROWS, adds)

    @inline
    def product(
        a: Any, a_row: int, names: Any, many: int, b: Any, b_row: int, depth: int, width: int, lanes: int, nothing: Any,
        c: Any, c_row: int,
    ) -> None:  # fmt: skip
        for j in range(0, width, PANEL_VECTORS * lanes):
            right, target = shifted(b, j), shifted(c, j)
            if many > SHORT_ROWS:
                if width - j > lanes:
                    tile(a, a_row, right, b_row, depth, names, many, nothing, target, c_row)
                else:
                    last_tile(a, a_row, right, b_row, depth, names, many, nothing, target, c_row)
            elif width - j > lanes:
                short_tile(a, a_row, right, b_row, depth, names, many, nothing, target, c_row)
            else:
                last_short_tile(a, a_row, right, b_row, depth, names, many, nothing, target, c_row)

    return product


# C[r, :] = A[names[r], :] B, and C[names[r], :] += A[r, :] B, for 1 ≤ many ≤ TILE_ROWS rows. Rows lie a_row, b_row and
# c_row numbers apart; B is read, and C written, up to a whole vector of the width. `nothing` is a vector of 0, or two.
multiply_listed, add_listed = _product(False), _product(True)
