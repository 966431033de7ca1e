"""Products of matrices in registers: C = C₀ + A B, one tile of C at a time.

The innermost level of a matrix product alone (Goto & van de Geijn, 2008), so that what comes between two products, an
exponential, finds its numbers in cache. A is read in place, number by number, with any strides: Aᵀ costs nothing. B is
packed into panels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import binding, ir
from numba.core import cgutils

from subquad_numpy.codegen import FUSE, Vector, inline, intrinsic, shifted, store, types


def _tile_shape() -> tuple[int, int]:
    """Rows and vectors of a tile: as many sums as registers hold, beside the operands of one step; 1 or 2 vectors."""
    wide = binding.get_host_cpu_features().get("avx512f", False)
    return (8, 2) if wide else (6, 1)


TILE_ROWS, PANEL_VECTORS = _tile_shape()


def _tile(vectors: int) -> Callable[..., Any]:
    """C[r, :] = C₀[r, :] + Σ_p A[r, p] B[p, :] for the rows of one tile and `vectors` vectors of columns."""

    @intrinsic
    def tile(
        typingctx: Any, a: Any, a_row: Any, a_step: Any, b: Any, depth: Any, c_0: Any, c_0_row: Any, c: Any, c_row: Any
    ) -> Any:
        vector = Vector(a.dtype)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            a, a_row, a_step, b, depth, c_0, c_0_row, c, c_row = args
            wide = context.get_value_type(vector)
            align = vector.element.bitwidth // 8

            def place(memory: Any, index: Any) -> Any:
                return builder.bitcast(builder.gep(memory, [index]), wide.as_pointer())

            def number(value: int) -> Any:
                return ir.Constant(cgutils.intp_t, value)

            def each() -> Any:
                return ((r, v) for r in range(TILE_ROWS) for v in range(vectors))

            sums = {cell: cgutils.alloca_once(builder, wide) for cell in each()}
            for r, v in each():
                index = builder.add(builder.mul(c_0_row, number(r)), number(v * vector.lanes))
                builder.store(builder.load(place(c_0, index), align=align), sums[r, v])
            rows = [builder.gep(a, [builder.mul(a_row, number(r))]) for r in range(TILE_ROWS)]
            undefined, lanes = ir.Constant(wide, ir.Undefined), ir.VectorType(ir.IntType(32), vector.lanes)
            with cgutils.for_range(builder, depth) as loop:
                at = builder.mul(loop.index, number(vectors * vector.lanes))
                columns = [
                    builder.load(place(b, builder.add(at, number(v * vector.lanes))), align=align)
                    for v in range(vectors)
                ]
                step = builder.mul(loop.index, a_step)
                for r in range(TILE_ROWS):
                    one = builder.load(builder.gep(rows[r], [step]))
                    one = builder.insert_element(undefined, one, ir.Constant(ir.IntType(32), 0))
                    one = builder.shuffle_vector(one, undefined, ir.Constant(lanes, None))
                    for v in range(vectors):
                        product = builder.fmul(one, columns[v], flags=FUSE)
                        builder.store(builder.fadd(builder.load(sums[r, v]), product, flags=FUSE), sums[r, v])
            for r, v in each():
                index = builder.add(builder.mul(c_row, number(r)), number(v * vector.lanes))
                builder.store(builder.load(sums[r, v]), place(c, index), align=align)
            return context.get_dummy_value()

        return types.none(a, types.intp, types.intp, b, types.intp, c_0, types.intp, c, types.intp), codegen

    return tile


_panel_tile, _last_tile = _tile(PANEL_VECTORS), _tile(1)


class Matrix(NamedTuple):
    """A matrix in memory: entry (i, j) is data[i row + j column]."""

    data: Any
    row: int
    column: int


class Panels(NamedTuple):
    """A second factor of products: panels of `PANEL_VECTORS` vectors of columns, each contiguous over `rows` rows."""

    data: Any
    rows: int


@inline
def rows_at(data: Any, row: int) -> Any:
    """A matrix of rows of adjacent numbers."""
    return Matrix(data, row, 1)


@inline
def turned(matrix: Any) -> Any:
    """The transposed matrix."""
    return Matrix(matrix.data, matrix.column, matrix.row)


@inline
def padded(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


@inline
def panel_at(column: int, width: int, lanes: int) -> tuple[int, int]:
    """First column of the panel that holds `column`, and how many of `width` columns it has."""
    first = column // (PANEL_VECTORS * lanes) * (PANEL_VECTORS * lanes)
    return first, min(PANEL_VECTORS * lanes, width - first)


@inline
def place_in(panels: Any, row: int, column: int, width: int, lanes: int) -> int:
    """Where an entry of a matrix of `width` columns lies in its panels."""
    first, columns = panel_at(column, width, lanes)
    return first * panels.rows + row * columns + column - first


@inline
def pack(matrix: Any, depth: int, width: int, scale: Any, lanes: int, panels: Any) -> None:
    """Copy `depth` rows of `scale` times a matrix into panels; columns up to a whole vector are 0."""
    whole = -(-width // lanes) * lanes
    for j in range(whole):
        first, columns = panel_at(j, whole, lanes)
        place = first * panels.rows + j - first
        for p in range(depth):
            value = matrix.data[p * matrix.row + j * matrix.column] * scale if j < width else 0
            panels.data[place + p * columns] = value


@inline
def into_panels(panels: Any, row: int, column: int, width: int, value: Any, lanes: int) -> None:
    """Store a vector of one row of a matrix of `width` columns, a multiple of the lanes."""
    store(panels.data, place_in(panels, row, column, width, lanes), value)


@inline
def multiply(a: Any, rows: int, b: Any, depth: int, width: int, lanes: int, start: Any, c: Any) -> None:
    """C = C₀ + A B, over the first `depth` rows of B, for `width` columns, a multiple of the lanes.

    A is a `Matrix`, B `Panels`; C₀, called `start`, and C have adjacent columns. Rows of A and C are there up to a
    whole tile. C₀ may be C itself, or one row for all if its row is 0.
    """
    for j in range(0, width, PANEL_VECTORS * lanes):
        panel = shifted(b.data, j * b.rows)
        for r in range(0, rows, TILE_ROWS):
            left, first = shifted(a.data, r * a.row), shifted(start.data, r * start.row + j)
            target = shifted(c.data, r * c.row + j)
            if width - j > lanes:
                _panel_tile(left, a.row, a.column, panel, depth, first, start.row, target, c.row)
            else:
                _last_tile(left, a.row, a.column, panel, depth, first, start.row, target, c.row)
