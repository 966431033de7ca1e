"""Operations on several vectors, one of each before the next one, whose chains a machine then runs side by side.

A machine starts operations in the order of the program, some sixty ahead of the oldest that waits. An exponential is a
chain of some fifteen operations, each of which waits for the one before: a core has under way only as many chains as
its window holds, and LLVM puts one chain behind the other. Here they advance together, one operation of each chain at a
time: eight registers hide the four cycles of an operation.
"""

from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import processor, types
from subquad_numpy.codegen.blocks import function_of, lanes_of_vectors
from subquad_numpy.codegen.vector_math import Coefficients, register_constant
from subquad_numpy.codegen.vector_type import FUSE

MOST_REGISTERS = 8  # of sixteen or more, which a machine without AVX would need for four vectors


def side_by_side(builder: Any, values: list[Any]) -> list[Any]:
    """The same vectors, each of which now depends on all of them: LLVM keeps what is before and after apart.

    The point that they pass together is empty assembly, and costs nothing.
    """
    size = processor.register_bytes()
    letter = "v" if processor.has("avx512f") else "x"  # of a register in assembly
    wide = values[0].type
    lanes = size * 8 // (32 if wide.element == ir.FloatType() else 64) if size else wide.count
    numbers = len(values) * wide.count
    if size == 0 or lanes > wide.count or not lanes < numbers <= MOST_REGISTERS * lanes:
        return values  # one register waits for no other
    word, whole = ir.IntType(32), ir.Constant(wide, ir.Undefined)
    register, parts = ir.VectorType(wide.element, lanes), range(0, wide.count, lanes)

    def lanes_from(first: int, count: int) -> Any:
        return ir.Constant(ir.VectorType(word, count), list(range(first, first + count)))

    pieces = [builder.shuffle_vector(x, whole, lanes_from(at, lanes)) for x in values for at in parts]
    kind = ir.FunctionType(ir.LiteralStructType([register] * len(pieces)), [register] * len(pieces))
    constraint = ",".join([f"={letter}" for _ in pieces] + [str(i) for i in range(len(pieces))])
    made = builder.asm(kind, "", constraint, pieces, side_effect=False)
    pieces = [builder.extract_value(made, i) for i in range(len(pieces))]
    joined = []
    for _ in values:
        own, pieces = pieces[: len(parts)], pieces[len(parts) :]
        while len(own) > 1:
            count = 2 * own[0].type.count
            own = [
                builder.shuffle_vector(*pair, lanes_from(0, count)) for pair in zip(own[::2], own[1::2], strict=True)
            ]
        joined.append(own[0])
    return joined


class Lines:
    """Operations on several vectors of one type, each on all of them before the next one."""

    def __init__(self, context: Any, builder: Any, vector: Any) -> None:
        self.context, self.builder, self.vector = context, builder, vector
        self.single = vector.element == types.float32
        self.mantissa = 23 if self.single else 52
        self.wide = ir.VectorType(ir.IntType(vector.element.bitwidth), vector.lanes)

    def constant(self, single: float, double: float) -> Any:
        return register_constant(self.context, self.builder, self.vector, single if self.single else double)

    def bounded(self, xs: list[Any], low: Any, high: Any = None, edge: Any = None) -> list[Any]:
        """The vectors within bounds, `low` also for what is less than `edge`; NaN stays NaN."""
        for predicate, limit, bound in (("<", edge or low, low), (">", high, high)):
            if bound is not None:
                beyond = [self.builder.fcmp_ordered(predicate, x, limit) for x in xs]
                xs = [self.builder.select(far, bound, x) for far, x in zip(beyond, xs, strict=True)]
        return xs

    def fused(self, xs: list[Any], y: Any, zs: list[Any]) -> list[Any]:
        """x y + z with one rounding."""
        name = f"llvm.fma.v{self.vector.lanes}{'f32' if self.single else 'f64'}"
        kind = ir.FunctionType(xs[0].type, [xs[0].type] * 3)
        function = function_of(self.builder.module, kind, name)
        return [self.builder.call(function, [x, y, z]) for x, z in zip(xs, zs, strict=True)]

    def products(self, xs: list[Any], ys: list[Any]) -> list[Any]:
        return [self.builder.fmul(x, y, flags=FUSE) for x, y in zip(xs, ys, strict=True)]

    def sums(self, xs: list[Any], ys: list[Any]) -> list[Any]:
        return [self.builder.fadd(x, y, flags=FUSE) for x, y in zip(xs, ys, strict=True)]

    def quotients(self, xs: list[Any], ys: list[Any]) -> list[Any]:
        return [self.builder.fdiv(x, y) for x, y in zip(xs, ys, strict=True)]

    def plain_sums(self, xs: list[Any], ys: list[Any]) -> list[Any]:
        """Sums that are fused with no product: the same number with and without bounds."""
        return [self.builder.fadd(x, y) for x, y in zip(xs, ys, strict=True)]

    def less(self, xs: list[Any], ys: list[Any]) -> list[Any]:
        return [self.builder.fsub(x, y) for x, y in zip(xs, ys, strict=True)]

    def fused_less(self, xs: list[Any], ys: list[Any]) -> list[Any]:
        """Differences that may be fused with products."""
        return [self.builder.fsub(x, y, flags=FUSE) for x, y in zip(xs, ys, strict=True)]

    def polynomial(self, xs: list[Any], single: Coefficients, double: Coefficients) -> list[Any]:
        """c[0] + c[1] x + c[2] x² + …, by Horner's rule."""
        terms = [self.constant(c, c) for c in (single if self.single else double)]
        values = [terms.pop()] * len(xs)
        while terms:
            values = self.sums(self.products(values, xs), [terms.pop()] * len(xs))
            values = side_by_side(self.builder, values)
        return values

    def powers(self, shifted: list[Any]) -> list[Any]:
        """2^w of numbers whose lowest bits, those that an exponent has, hold w plus the bias of exponents."""
        shift = ir.Constant(self.wide, [self.mantissa] * self.vector.lanes)
        bits = [self.builder.shl(self.as_whole(x), shift) for x in shifted]
        return [self.builder.bitcast(x, shifted[0].type) for x in bits]

    def as_whole(self, x: Any) -> Any:
        """The bits of a vector as integers."""
        return self.builder.bitcast(x, self.wide)

    def looked_up(self, table: tuple[float, ...], places: Any) -> Any:
        """The numbers of a table of 16, integers or float32, at these places modulo 16."""
        is_whole = isinstance(table[0], int)
        kind = self.wide if is_whole else ir.VectorType(ir.FloatType(), 16)
        name = f"llvm.x86.avx512.permvar.{'si' if is_whole else 'sf'}.512"
        function = function_of(self.builder.module, ir.FunctionType(kind, [kind, self.wide]), name)
        return self.builder.call(function, [ir.Constant(kind, list(table)), places])

    def looked_up_in_four(self, table: tuple[int, ...], places: Any) -> Any:
        """The integers of a table of 4, at these places modulo 4."""
        builder, half = self.builder, ir.VectorType(ir.FloatType(), 8)
        kind = ir.FunctionType(half, [half, ir.VectorType(ir.IntType(32), 8)])
        function = function_of(builder.module, kind, "llvm.x86.avx.vpermilvar.ps.256")
        fours = builder.bitcast(ir.Constant(kind.args[1], list(table) * 2), half)
        halves = [builder.shuffle_vector(places, places, lanes_of_vectors(tuple(range(at, at + 8)))) for at in (0, 8)]
        found = [builder.call(function, [fours, part]) for part in halves]
        return builder.bitcast(builder.shuffle_vector(*found, lanes_of_vectors(tuple(range(16)))), self.wide)

    def rounding(self, parts: int = 1) -> Any:
        """A number plus this one is a multiple of 1 / parts, a power of two: its lowest bits are that plus the bias."""
        return self.constant(1.5 * 2**24 / (2 * parts) + 127, 1.5 * 2**53 / (2 * parts) + 1023)
