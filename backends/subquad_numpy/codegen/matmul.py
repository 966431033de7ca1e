"""Products of matrices in registers: C = C₀ + A B, one tile of C at a time.

This is the innermost level of a matrix product alone (Goto & van de Geijn, 2008). The levels above are the loops of a
kernel over blocks, which take an exponential between two products while the numbers are in cache. A is read in place,
number by number, with any strides, so that Aᵀ costs nothing. B is packed into panels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from subquad_numpy.codegen import FUSE, Vector, apart, inline, intrinsic, load, processor, shifted, store, types
from subquad_numpy.codegen.blocks import WORD, for_range, variable
from subquad_numpy.codegen.copies import turn


def _tile_shape() -> tuple[int, int]:
    """Rows and vectors of a tile: the sums must fit in registers, beside the numbers of A and B of one step."""
    wide = processor.has("avx512f")
    return (8, 2) if wide else (6, 1)  # 16 of 32 registers of AVX-512; 12 of 16 of AVX2, where a vector takes two


TILE_ROWS, PANEL_VECTORS = _tile_shape()
HAS_HALVES = PANEL_VECTORS == 1  # a vector takes several registers, so that half of one saves half of the work


def number(value: int) -> Any:
    """A constant index."""
    return ir.Constant(WORD, value)


def emit_tile(
    context: Any, builder: Any, vector: Vector, vectors: int, a_step: Any, b: Any, b_row: Any, depth: Any,
    a: list[Any], c_0: list[Any], c: list[Any],
) -> None:  # fmt: skip
    """Write the code of C = C₀ + A B for a tile of `vectors` vectors of columns, whose rows of A, C₀ and C are given.

    `b_row` is B's stride from row to row in elements, `a_step` A's from column to column.
    """
    wide, align = context.get_value_type(vector), vector.element.bitwidth // 8

    def place(memory: Any, index: Any) -> Any:
        return builder.bitcast(builder.gep(memory, [index]), wide.as_pointer())

    # one variable for each vector of the tile, which LLVM keeps in registers; they start as C₀
    each = [(r, v) for r in range(len(a)) for v in range(vectors)]
    sums = {cell: variable(builder, wide) for cell in each}
    for r, v in each:
        builder.store(builder.load(place(c_0[r], number(v * vector.lanes)), align=align), sums[r, v])
    undefined, lanes = ir.Constant(wide, ir.Undefined), ir.VectorType(ir.IntType(32), vector.lanes)
    with for_range(builder, depth) as loop:
        at = builder.mul(loop.index, b_row)
        columns = [
            builder.load(place(b, builder.add(at, number(v * vector.lanes))), align=align) for v in range(vectors)
        ]
        step = builder.mul(loop.index, a_step)
        # every number A[r, p] is spread over a vector and multiplied with the row B[p, :]
        for r, row in enumerate(a):
            one = builder.load(builder.gep(row, [step]))
            one = builder.insert_element(undefined, one, ir.Constant(ir.IntType(32), 0))
            one = builder.shuffle_vector(one, undefined, ir.Constant(lanes, None))
            for v in range(vectors):
                product = builder.fmul(one, columns[v], flags=FUSE)
                builder.store(builder.fadd(builder.load(sums[r, v]), product, flags=FUSE), sums[r, v])
    for r, v in each:
        builder.store(builder.load(sums[r, v]), place(c[r], number(v * vector.lanes)), align=align)


def _tile(vectors: int, parts: int = 1) -> Callable[..., Any]:
    """The intrinsic C[r, :] = C₀[r, :] + Σ_p A[r, p] B[p, :] for the rows of one tile and `vectors` vectors of columns.

    With `parts`, for one of so many equal parts of a vector, and as many times the rows.

    `a_row`, `b_row`, `c_0_row` and `c_row` are strides from row to row in elements, `a_step` is A's from column to
    column.
    """

    @intrinsic
    def tile(
        a: Any, a_row: Any, a_step: Any, b: Any, b_row: Any, depth: Any, c_0: Any, c_0_row: Any, c: Any, c_row: Any
    ) -> Any:
        vector = Vector(a.dtype, parts)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            a, a_row, a_step, b, b_row, depth, c_0, c_0_row, c, c_row = args

            def rows_of(memory: Any, stride: Any) -> list[Any]:
                return [builder.gep(memory, [builder.mul(stride, number(r))]) for r in range(TILE_ROWS * parts)]

            emit_tile(
                context, builder, vector, vectors, a_step, b, b_row, depth,
                rows_of(a, a_row), rows_of(c_0, c_0_row), rows_of(c, c_row),
            )  # fmt: skip
            return context.get_dummy_value()

        word = types.intp
        return types.none(a, word, word, b, word, word, c_0, word, c, word), codegen

    return tile


_panel_tile, _last_tile, _half_tile = _tile(PANEL_VECTORS), _tile(1), _tile(1, 2)


class Matrix(NamedTuple):
    """A matrix in memory: entry (i, j) is data[i row + j column]."""

    data: Any
    row: int
    column: int


class Panels(NamedTuple):
    """The right factor of a product: panels of `PANEL_VECTORS` vectors of columns, each contiguous over `rows` rows."""

    data: Any
    rows: int


@inline
def rows_at(data: Any, row: int) -> Any:
    """The matrix whose rows start `row` elements apart, each of adjacent numbers; `row` 0 repeats one row."""
    return Matrix(data, row, 1)


@inline
def turned(matrix: Any) -> Any:
    """The transposed matrix."""
    return Matrix(matrix.data, matrix.column, matrix.row)


@inline
def padded(size: int, step: int) -> int:
    """`size` rounded up to a multiple of `step`."""
    return -(-size // step) * step


@inline
def panel_at(column: int, width: int, lanes: int) -> tuple[int, int]:
    """First column of the panel that holds `column`, and how many of `width` columns it has."""
    first = column // (PANEL_VECTORS * lanes) * (PANEL_VECTORS * lanes)
    return first, min(PANEL_VECTORS * lanes, width - first)


@inline
def place_in(panels: Any, row: int, column: int, width: int, lanes: int) -> int:
    """The index in `panels.data` of an entry of a matrix of `width` columns, a multiple of the lanes."""
    first, columns = panel_at(column, width, lanes)
    return first * panels.rows + row * columns + column - first


@inline
def pack(matrix: Any, depth: int, width: int, scale: Any, lanes: int, panels: Any) -> None:
    """Copy `depth` rows of a matrix, times `scale`, into panels; columns that fill up the last vector are 0."""
    pack_up_to(matrix, depth, width, padded(width, lanes), scale, lanes, panels)


@inline
def pack_up_to(matrix: Any, depth: int, width: int, whole: int, scale: Any, lanes: int, panels: Any) -> None:
    """`pack`, with columns of 0 up to `whole`, a multiple of the lanes."""
    for j in range(0, whole, lanes):
        first, columns = panel_at(j, whole, lanes)
        target, source, done = shifted(panels.data, first * panels.rows + j - first), matrix.data, 0
        if j + lanes <= width and matrix.column == 1:
            done = depth
            for p in range(depth):
                store(target, p * columns, load(source, p * matrix.row + j) * scale)
        elif j + lanes <= width and matrix.row == 1:
            done = depth // lanes * lanes
            for p in range(0, done, lanes):
                tile, to = shifted(source, p + j * matrix.column), shifted(target, p * columns)
                turn(tile, tile, matrix.column, to, to, columns)
            for p in range(done):
                store(target, p * columns, load(target, p * columns) * scale)
        for c in range(lanes):
            for p in range(done, depth):
                value = source[p * matrix.row + (j + c) * matrix.column] * scale if j + c < width else 0
                target[p * columns + c] = value


@inline
def into_panels(panels: Any, row: int, column: int, width: int, value: Any, lanes: int) -> None:
    """Store a vector of one row of a matrix of `width` columns, a multiple of the lanes."""
    store(panels.data, place_in(panels, row, column, width, lanes), value)


@apart
def multiply(a: Any, rows: int, b: Any, depth: int, width: int, lanes: int, start: Any, c: Any) -> None:
    """C = C₀ + A B, over the first `depth` rows of B, for `width` columns, a multiple of the lanes.

    A is a `Matrix` and B `Panels`; C₀, called `start`, and C are matrices with adjacent columns. A and C must have
    memory for `rows` rounded up to whole tiles. C₀ may be C, or one row that is added to all (`rows_at(data, 0)`).
    """
    for j in range(0, width, PANEL_VECTORS * lanes):
        panel = shifted(b.data, j * b.rows)
        for r in range(0, rows, TILE_ROWS):
            left, first = shifted(a.data, r * a.row), shifted(start.data, r * start.row + j)
            target = shifted(c.data, r * c.row + j)
            if width - j > lanes:
                step = PANEL_VECTORS * lanes
                _panel_tile(left, a.row, a.column, panel, step, depth, first, start.row, target, c.row)
            else:
                _last_tile(left, a.row, a.column, panel, lanes, depth, first, start.row, target, c.row)


@apart
def multiply_vector(a: Any, rows: int, b: Any, b_row: int, depth: int, start: Any, c: Any) -> None:
    """`multiply` for one vector of columns of a panel, whose rows are `b_row` numbers apart."""
    for r in range(0, rows, TILE_ROWS):
        left, first = shifted(a.data, r * a.row), shifted(start.data, r * start.row)
        _last_tile(left, a.row, a.column, b, b_row, depth, first, start.row, shifted(c.data, r * c.row), c.row)


@apart
def multiply_half(a: Any, rows: int, b: Any, b_row: int, depth: int, half: int, start: Any, c: Any) -> None:
    """`multiply_vector` for the half of a vector from column `half` on; some rows may have the other half too."""
    for r in range(0, rows, 2 * TILE_ROWS):
        left, first, target = shifted(a.data, r * a.row), shifted(start.data, r * start.row), shifted(c.data, r * c.row)
        if r + TILE_ROWS < rows:
            first, target = shifted(first, half), shifted(target, half)
            _half_tile(left, a.row, a.column, shifted(b, half), b_row, depth, first, start.row, target, c.row)
        else:
            _last_tile(left, a.row, a.column, b, b_row, depth, first, start.row, target, c.row)
