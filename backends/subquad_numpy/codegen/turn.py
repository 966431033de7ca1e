"""A square tile of a matrix, transposed in registers."""

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import types
from subquad_numpy.codegen.vector_type import Vector, intrinsic


@cache
def turn_tile(source_pairs: bool, target_pairs: bool) -> Callable[..., Any]:
    """The intrinsic that writes the transpose of a tile of as many rows as a vector has lanes.

        turn(source, odd_source, source_step, target, odd_target, target_step)

    Row i of the source is a vector at source[i · source_step]. With `source_pairs`, two matrices take turns: row 2i is
    at source[i · source_step], and row 2i + 1 at odd_source[i · source_step]. So do rows of the target with
    `target_pairs`, which parts complex numbers.
    """

    @intrinsic
    def turn(source: Any, odd_source: Any, source_step: Any, target: Any, odd_target: Any, target_step: Any) -> Any:
        vector = Vector(source.dtype)
        lanes = vector.lanes

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source, odd_source, source_step, target, odd_target, target_step = args
            wide = context.get_value_type(vector)
            align, word = vector.element.bitwidth // 8, ir.IntType(32)

            def place(even: Any, odd: Any, step: Any, row: int, pairs: bool) -> Any:
                memory, count = (odd if row % 2 else even, row // 2) if pairs else (even, row)
                index = builder.mul(step, ir.Constant(step.type, count))
                return builder.bitcast(builder.gep(memory, [index]), wide.as_pointer())

            def chosen(a: Any, b: Any, lanes_of_both: list[int]) -> Any:
                mask = ir.Constant(ir.VectorType(word, lanes), lanes_of_both)
                return builder.shuffle_vector(a, b, mask)

            rows = [
                builder.load(place(source, odd_source, source_step, i, source_pairs), align=align) for i in range(lanes)
            ]
            half = lanes // 2
            while half:  # exchange the off-diagonal quarters of all tiles of 2 · half rows
                for i in range(lanes):
                    if not i & half:
                        a, b = rows[i], rows[i | half]
                        rows[i] = chosen(a, b, [lanes + (j ^ half) if j & half else j for j in range(lanes)])
                        rows[i | half] = chosen(a, b, [lanes + j if j & half else j | half for j in range(lanes)])
                half //= 2
            for i, row in enumerate(rows):
                builder.store(row, place(target, odd_target, target_step, i, target_pairs), align=align)
            return context.get_dummy_value()

        number = types.intp
        return types.none(source, source, number, target, target, number), codegen

    return turn


def _joined(memory: Any, join: Callable[[Any, Any, Any], Any]) -> tuple[Any, Any]:
    # signature and code of: a vector whose lane i is the vector at memory[index + i lanes], its halves joined until one
    # lane is left. Vectors join in pairs as they turn, which takes a third of the operations of each on its own
    vector = Vector(memory.dtype)
    lanes = vector.lanes

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide, word = context.get_value_type(vector).as_pointer(), ir.IntType(32)
        align = vector.element.bitwidth // 8

        def row(i: int) -> Any:
            place = builder.gep(args[0], [builder.add(args[1], ir.Constant(args[1].type, i * lanes))])
            return builder.load(builder.bitcast(place, wide), align=align)

        def chosen(a: Any, b: Any, half: int, from_upper: bool) -> Any:
            # of each 2 · half lanes, a half of those of a, then the same of b
            first = half if from_upper else 0
            mask = [lanes + (j ^ half | first) if j & half else j | first for j in range(lanes)]
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(word, lanes), mask))

        rows, half = [row(i) for i in range(lanes)], lanes // 2
        while half:
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [join(builder, chosen(a, b, half, False), chosen(a, b, half, True)) for a, b in pairs]
            half //= 2
        return rows[0]

    return vector(memory, types.intp), codegen


@intrinsic
def totals(memory: Any, index: Any) -> Any:
    """A vector whose lane i is the sum of the lanes of the vector at memory[index + i · lanes], added pairwise."""
    return _joined(memory, lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def maxima(memory: Any, index: Any) -> Any:
    """A vector whose lane i is the maximum of the lanes of the vector at memory[index + i · lanes], without NaN."""
    return _joined(memory, lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))
