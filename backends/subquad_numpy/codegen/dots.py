"""Dot products of a few rows of x with a few rows of W, in registers; weights are widened as they are loaded."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from subquad_numpy.codegen import BYTES, FUSE, Vector, apart, intrinsic, processor, types
from subquad_numpy.codegen.blocks import WORD, ask_for_line, for_range, function_of, variable, variable_of
from subquad_numpy.codegen.halves import widened
from subquad_numpy.runtime.stored import BFLOAT16, FLOAT16

STORED = {"float16": np.int16(0), "bfloat16": np.uint16(0), "float32": np.float32(0), "float64": np.float64(0)}
"""A number of the type that stands for a dtype of weights in pointers: the type alone tells a tile how to widen."""
HALVES = {types.int16: FLOAT16, types.uint16: BFLOAT16}


def _shapes() -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, outputs) of the tile of one row, and of that of many: the sums must fit in registers."""
    wide = processor.has("avx512f")
    return ((1, 4), (4, 4)) if wide else ((1, 4), (2, 2))


ONE, MANY = _shapes()


def _dot_tile(rows: int, outputs: int, passes: int) -> Callable[..., Any]:
    """The intrinsic y[r, j] = bias[j] + Σ_i x[r, i] W[j, i] for a tile of rows and outputs.

        tile(x, step, W, inputs, row, last_row, output, last_output, y, width, bias, has_bias, turn)

    Rows of x are `step` numbers apart, those of y `width`. Rows start at `row`, outputs at `output`. Those beyond the
    last ones stand for the last ones, which are computed again: the tile at an edge has the shape of the others.

    Meanwhile the rows of W of the next tile are prefetched, a part of them in each `turn` of the `passes` that the rows
    of x take: memory is then busy all the time, where the hardware's prefetching would wait for the next tile.
    """

    @intrinsic
    def tile(
        x: Any, step: Any, W: Any, inputs: Any, row: Any, last_row: Any, output: Any,
        last_output: Any, y: Any, width: Any, bias: Any, has_bias: Any, turn: Any,
    ) -> Any:  # fmt: skip
        vector = Vector(x.dtype)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x, step, W, inputs, row, last_row, output, last_output, y, width, bias, has_bias, turn = args
            wide, number = context.get_value_type(vector), context.get_value_type(vector.element)

            def word(value: int) -> Any:
                return ir.Constant(WORD, value)

            def clamped(first: Any, step: int, last: Any) -> Any:
                at = builder.add(first, word(step))
                return builder.select(builder.icmp_signed("<", at, last), at, last)

            def weight(memory: Any, index: Any, lanes: int) -> Any:
                address = builder.gep(memory, [index])
                if lanes > 1:
                    address = builder.bitcast(address, ir.VectorType(memory.type.pointee, lanes).as_pointer())
                value = builder.load(address, align=sig.args[2].dtype.bitwidth // 8)
                return _widened(builder, value, sig.args[2].dtype, wide if lanes > 1 else number, lanes)

            at_rows = [clamped(row, r, last_row) for r in range(rows)]
            at_outputs = [clamped(output, j, last_output) for j in range(outputs)]
            of_x = [builder.gep(x, [builder.mul(at, step)]) for at in at_rows]
            of_W = [builder.gep(W, [builder.mul(at, inputs)]) for at in at_outputs]
            cells = [(r, j) for r in range(rows) for j in range(outputs)]

            # one variable for each sum, which LLVM keeps in registers
            sums = {cell: variable_of(builder, ir.Constant(wide, None)) for cell in cells}
            for cell in cells:  # the variables are made once a function, the tile may come many times
                builder.store(ir.Constant(wide, None), sums[cell])
            steps = builder.udiv(inputs, word(vector.lanes))
            # bytes of W that a step of the loop below reads, divided by the passes
            share = outputs * vector.lanes * sig.args[2].dtype.bitwidth // 8 // passes
            ahead = builder.gep(W, [builder.mul(builder.add(output, word(outputs)), inputs)])
            ahead = builder.bitcast(ahead, ir.IntType(8).as_pointer())
            ahead = builder.gep(ahead, [builder.mul(builder.mul(steps, word(share)), turn)])
            with for_range(builder, steps) as loop:
                at = builder.mul(loop.index, word(vector.lanes))
                for byte in range(0, share, BYTES):
                    next_line = builder.add(builder.mul(loop.index, word(share)), word(byte))
                    ask_for_line(builder, builder.gep(ahead, [next_line]))
                weights = [weight(memory, at, vector.lanes) for memory in of_W]
                for r, memory in enumerate(of_x):
                    address = builder.bitcast(builder.gep(memory, [at]), wide.as_pointer())
                    values = builder.load(address, align=vector.element.bitwidth // 8)
                    for j in range(outputs):
                        _add_product(builder, sums[r, j], values, weights[j])

            totals = {cell: variable(builder, number) for cell in cells}
            letter = "f32" if vector.element == types.float32 else "f64"
            kind = ir.FunctionType(number, [number, wide])
            name = f"llvm.vector.reduce.fadd.v{vector.lanes}{letter}"
            reduce = function_of(builder.module, kind, name)
            for cell in cells:
                given = [ir.Constant(number, -0.0), builder.load(sums[cell])]
                builder.store(builder.call(reduce, given, fastmath=("reassoc",)), totals[cell])
            with for_range(builder, builder.urem(inputs, word(vector.lanes))) as loop:
                at = builder.add(builder.mul(steps, word(vector.lanes)), loop.index)
                weights = [weight(memory, at, 1) for memory in of_W]
                for r, memory in enumerate(of_x):
                    value = builder.load(builder.gep(memory, [at]))
                    for j in range(outputs):
                        _add_product(builder, totals[r, j], value, weights[j])

            biases = [variable(builder, number) for _ in range(outputs)]
            for j in range(outputs):
                builder.store(ir.Constant(number, 0.0), biases[j])
            with builder.if_then(has_bias, likely=True):
                for j in range(outputs):
                    builder.store(builder.load(builder.gep(bias, [at_outputs[j]])), biases[j])
            for r, j in cells:
                place = builder.gep(y, [builder.add(builder.mul(at_rows[r], width), at_outputs[j])])
                builder.store(builder.fadd(builder.load(totals[r, j]), builder.load(biases[j])), place)
            return context.get_dummy_value()

        number = types.intp
        given = (x, number, W, number, number, number, number, number, y, number, bias, types.boolean, number)
        return types.none(*given), codegen

    return tile


def _add_product(builder: Any, total: Any, x: Any, y: Any) -> None:
    # total += x y, with one rounding where the machine can
    builder.store(builder.fadd(builder.load(total), builder.fmul(x, y, flags=FUSE), flags=FUSE), total)


def _widened(builder: Any, value: Any, stored: Any, target: Any, lanes: int) -> Any:
    """Weights as numbers of the type `target`, exactly."""
    kind = HALVES.get(stored)
    value = value if kind is None else widened(builder, value, kind, lanes)
    return value if value.type == target else builder.fpext(value, target)


_one, _single, _double, _fourfold = (
    _dot_tile(*shape, passes) for shape, passes in ((ONE, 1), (MANY, 1), (MANY, 2), (MANY, 4))
)
_OF_ONE, (_ROWS, _OF_MANY) = ONE[1], MANY


@apart
def multiply(
    x: Any, step: int, rows: int, W: Any, inputs: int, start: int, stop: int, y: Any, width: int, bias: Any,
    has_bias: bool,
) -> None:  # fmt: skip
    """y[r, j] = bias[j] + Σ_i x[r, i] W[j, i] for all rows of x and the outputs j = start … stop − 1.

    Rows of x are `step` numbers apart, those of y `width`. The few rows of W that a tile takes stay in the first cache
    while all rows of x pass by.
    """
    if rows == 1:
        for j in range(start, stop, _OF_ONE):
            _one(x, step, W, inputs, 0, 0, j, stop - 1, y, width, bias, has_bias, 0)
        return
    for j in range(start, stop, _OF_MANY):
        if rows <= _ROWS:
            _single(x, step, W, inputs, 0, rows - 1, j, stop - 1, y, width, bias, has_bias, 0)
        elif rows <= 2 * _ROWS:
            for turn in range(2):
                _double(x, step, W, inputs, turn * _ROWS, rows - 1, j, stop - 1, y, width, bias, has_bias, turn)
        else:
            for turn in range(-(-rows // _ROWS)):
                _fourfold(x, step, W, inputs, turn * _ROWS, rows - 1, j, stop - 1, y, width, bias, has_bias, turn)
