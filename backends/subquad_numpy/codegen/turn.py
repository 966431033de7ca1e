"""A square tile of a matrix, transposed in registers."""

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import types
from subquad_numpy.codegen.blocks import hidden, lanes_of_vectors
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
            source, odd_source, target, odd_target = (hidden(builder, args[i]) for i in (0, 1, 3, 4))
            source_step, target_step = args[2], args[5]
            wide = context.get_value_type(vector)
            align = vector.element.bitwidth // 8

            def place(even: Any, odd: Any, step: Any, row: int, pairs: bool) -> Any:
                memory, count = (odd if row % 2 else even, row // 2) if pairs else (even, row)
                index = builder.mul(step, ir.Constant(step.type, count))
                return builder.bitcast(builder.gep(memory, [index]), wide.as_pointer())

            def chosen(a: Any, b: Any, lanes_of_both: list[int]) -> Any:
                return builder.shuffle_vector(a, b, lanes_of_vectors(tuple(lanes_of_both)))

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


def _joined(memory: Any, join: Callable[[Any, Any, Any], Any], least: int = 1) -> tuple[Any, Any]:
    # signature and code of: a vector whose lane i is the vector at memory[index + i lanes], its halves joined until
    # `least` lanes are left, of as many times fewer vectors. Vectors join in pairs as they turn, which takes a third of
    # the operations of each on its own
    vector = Vector(memory.dtype)
    lanes = vector.lanes

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = context.get_value_type(vector).as_pointer()
        align = vector.element.bitwidth // 8

        first = hidden(builder, builder.gep(args[0], [args[1]]))

        def row(i: int) -> Any:
            place = builder.gep(first, [ir.Constant(args[1].type, i * lanes)])
            return builder.load(builder.bitcast(place, wide), align=align)

        def chosen(a: Any, b: Any, half: int, from_upper: bool) -> Any:
            # of each 2 · half lanes, a half of those of a, then the same of b
            first = half if from_upper else 0
            mask = [lanes + (j ^ half | first) if j & half else j | first for j in range(lanes)]
            return builder.shuffle_vector(a, b, lanes_of_vectors(tuple(mask)))

        count = lanes // least
        rows = [row(i) for i in range(count)]
        while count > 1:
            count //= 2
            half = count * least
            pairs = zip(rows[:count], rows[count:], strict=True)
            rows = [join(builder, chosen(a, b, half, False), chosen(a, b, half, True)) for a, b in pairs]
        return rows[0]

    return vector(memory, types.intp), codegen


@intrinsic
def totals(memory: Any, index: Any) -> Any:
    """A vector whose lane i is the sum of the lanes of the vector at memory[index + i · lanes], added pairwise."""
    return _joined(memory, lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def quarters(x: Vector, y: Vector, z: Vector, w: Vector) -> Any:
    """A vector whose lane i has a part of the sum of the lanes of vector i modulo 4: the sum of every fourth group."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def sum_of(a: Any, b: Any, of_four: list[int]) -> Any:
            # of each four lanes of a, then of b: those at the first places plus those two further on
            def lanes_at(ahead: int) -> Any:
                firsts = (divmod(of_four[i % 4], 4) for i in range(x.lanes))
                mask = [i - i % 4 + place + ahead + x.lanes * of_b for i, (of_b, place) in enumerate(firsts)]
                return builder.shuffle_vector(a, b, lanes_of_vectors(tuple(mask)))

            return builder.fadd(lanes_at(0), lanes_at(2))

        alternating, halves = [0, 4, 1, 5], [0, 1, 4, 5]
        return sum_of(sum_of(*args[:2], alternating), sum_of(*args[2:], alternating), halves)

    return x(x, x, x, x), codegen


@intrinsic
def totals_of_quarters(memory: Any, index: Any) -> Any:
    """A vector whose lane i is the sum of all parts of sum i that the vectors of `quarters` from `index` on have."""
    return _joined(memory, lambda builder, a, b: builder.fadd(a, b), least=4)


@intrinsic
def maxima(memory: Any, index: Any) -> Any:
    """A vector whose lane i is the maximum of the lanes of the vector at memory[index + i · lanes], without NaN."""
    return _joined(memory, lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))
