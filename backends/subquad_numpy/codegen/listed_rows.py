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
        typingctx: Any, a: Any, a_row: Any, b: Any, b_row: Any, depth: Any, names: Any, many: Any, nothing: Any, c: Any,
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


_tiles = {(v, h, adds): _tile(v, h, adds) for v in (1, PANEL_VECTORS) for h in (TILE_ROWS, SHORT_ROWS)
          for adds in (False, True)}  # fmt: skip
_multiply_long, _multiply_long_last = _tiles[PANEL_VECTORS, TILE_ROWS, False], _tiles[1, TILE_ROWS, False]
_multiply_short, _multiply_short_last = _tiles[PANEL_VECTORS, SHORT_ROWS, False], _tiles[1, SHORT_ROWS, False]
_add_long, _add_long_last = _tiles[PANEL_VECTORS, TILE_ROWS, True], _tiles[1, TILE_ROWS, True]
_add_short, _add_short_last = _tiles[PANEL_VECTORS, SHORT_ROWS, True], _tiles[1, SHORT_ROWS, True]


@inline
def multiply_listed(
    a: Any, a_row: int, names: Any, many: int, b: Any, b_row: int, depth: int, width: int, lanes: int, nothing: Any,
    c: Any, c_row: int,
) -> None:  # fmt: skip
    """C[r, :] = A[names[r], :] B for 1 ≤ `many` ≤ TILE_ROWS rows. `nothing` is a vector of 0, or two.

    Rows lie `a_row`, `b_row` and `c_row` numbers apart. B is read, and C written, up to a whole vector of `width`.
    """
    for j in range(0, width, PANEL_VECTORS * lanes):
        right, target = shifted(b, j), shifted(c, j)
        if many > SHORT_ROWS:
            if width - j > lanes:
                _multiply_long(a, a_row, right, b_row, depth, names, many, nothing, target, c_row)
            else:
                _multiply_long_last(a, a_row, right, b_row, depth, names, many, nothing, target, c_row)
        elif width - j > lanes:
            _multiply_short(a, a_row, right, b_row, depth, names, many, nothing, target, c_row)
        else:
            _multiply_short_last(a, a_row, right, b_row, depth, names, many, nothing, target, c_row)


@inline
def add_listed(
    a: Any, a_row: int, names: Any, many: int, b: Any, b_row: int, depth: int, width: int, lanes: int, c: Any,
    c_row: int,
) -> None:  # fmt: skip
    """C[names[r], :] += A[r, :] B for 1 ≤ `many` ≤ TILE_ROWS different rows; see `multiply_listed`."""
    for j in range(0, width, PANEL_VECTORS * lanes):
        right, target = shifted(b, j), shifted(c, j)
        if many > SHORT_ROWS:
            if width - j > lanes:
                _add_long(a, a_row, right, b_row, depth, names, many, a, target, c_row)
            else:
                _add_long_last(a, a_row, right, b_row, depth, names, many, a, target, c_row)
        elif width - j > lanes:
            _add_short(a, a_row, right, b_row, depth, names, many, a, target, c_row)
        else:
            _add_short_last(a, a_row, right, b_row, depth, names, many, a, target, c_row)
