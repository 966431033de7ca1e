"""Exponentials of several vectors, whose chains of dependent operations a machine runs side by side.

A machine starts operations in the order of the program, some sixty ahead of the oldest that waits. An exponential is a
chain of some fifteen operations, each of which waits for the one before: a core has under way only as many chains as
its window holds, and LLVM puts one chain behind the other. Here they advance together, one operation of each chain at a
time: eight registers hide the four cycles of an operation.
"""

from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils

from subquad_numpy.codegen import processor
from subquad_numpy.codegen.vector_math import EXP2, LOG2_E, register_constant
from subquad_numpy.codegen.vector_type import FUSE, intrinsic, types

C0, C1, C2 = 0.6931471805599453, 0.2402335515698872, 0.05550508525196963
MOST_REGISTERS = 8  # of sixteen or more, which a machine without AVX would need for four vectors


@cache
def _registers() -> tuple[int, str]:
    # (bytes of a vector register of this machine, its letter in assembly); (0, "") where we do not know it
    if not binding.get_process_triple().startswith("x86_64"):
        return 0, ""
    return (64, "v") if processor.has("avx512f") else (32, "x") if processor.has("avx") else (16, "x")


def side_by_side(builder: Any, values: list[Any]) -> list[Any]:
    """The same vectors, each of which now depends on all of them: LLVM keeps what is before and after apart.

    The point that they pass together is empty assembly, and costs nothing.
    """
    size, letter = _registers()
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


class _Lines:
    """Operations on several vectors of one type, each on all of them before the next one."""

    def __init__(self, context: Any, builder: Any, vector: Any) -> None:
        self.context, self.builder, self.vector = context, builder, vector
        self.single = vector.element == types.float32
        self.mantissa = 23 if self.single else 52
        self.wide = ir.VectorType(ir.IntType(vector.element.bitwidth), vector.lanes)

    def constant(self, single: float, double: float) -> Any:
        return register_constant(self.context, self.builder, self.vector, single if self.single else double)

    def bounded(self, xs: list[Any], low: Any, high: Any = None) -> list[Any]:
        """The vectors within bounds; NaN stays NaN."""
        for predicate, bound in (("<", low), (">", high)):
            if bound is not None:
                beyond = [self.builder.fcmp_ordered(predicate, x, bound) for x in xs]
                xs = [self.builder.select(far, bound, x) for far, x in zip(beyond, xs, strict=True)]
        return xs

    def fused(self, xs: list[Any], y: Any, zs: list[Any]) -> list[Any]:
        """x y + z with one rounding."""
        name = f"llvm.fma.v{self.vector.lanes}{'f32' if self.single else 'f64'}"
        kind = ir.FunctionType(xs[0].type, [xs[0].type] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return [self.builder.call(function, [x, y, z]) for x, z in zip(xs, zs, strict=True)]

    def products(self, xs: list[Any], ys: list[Any]) -> list[Any]:
        return [self.builder.fmul(x, y, flags=FUSE) for x, y in zip(xs, ys, strict=True)]

    def sums(self, xs: list[Any], ys: list[Any]) -> list[Any]:
        return [self.builder.fadd(x, y, flags=FUSE) for x, y in zip(xs, ys, strict=True)]

    def less(self, xs: list[Any], ys: list[Any]) -> list[Any]:
        return [self.builder.fsub(x, y) for x, y in zip(xs, ys, strict=True)]

    def exp2_less_1(self, xs: list[Any]) -> list[Any]:
        """2^x − 1 for |x| <= 1/2."""
        terms = [self.constant(c, c) for c in EXP2[0 if self.single else 1]]
        values = [terms.pop()] * len(xs)
        while terms:
            values = self.sums(self.products(values, xs), [terms.pop()] * len(xs))
            values = side_by_side(self.builder, values)
        return self.products(xs, values)

    def powers(self, shifted: list[Any]) -> list[Any]:
        """2^w of numbers whose lowest bits, those that an exponent has, hold w plus the bias of exponents."""
        shift = ir.Constant(self.wide, [self.mantissa] * self.vector.lanes)
        bits = [self.builder.shl(self.builder.bitcast(x, self.wide), shift) for x in shifted]
        return [self.builder.bitcast(x, shifted[0].type) for x in bits]

    def rounding(self) -> Any:
        """A number plus this one is rounded to a whole number, and has that plus the bias in its lowest bits."""
        return self.constant(1.5 * 2**23 + 127, 1.5 * 2**52 + 1023)


@intrinsic
def scaled_exp2(typingctx: Any, xs: Any) -> Any:
    """The powers, then the rests, of a tuple of vectors x. They represent 2^x in a recurrence: with k = power h,
    2^x h = k + rest k.

    `power` is a power of two, and 1 for |x| < 1/2; `rest` = 2^x / power − 1 has all its digits: a slow decay would lose
    them in a number next to 1, and make one and the same error at every step. 2^x is within 2 units in the last place;
    `power` is 0 where 2^x is below the normal numbers, and infinite from x = 127.5 (1023.5) on. NaN stays NaN, in
    `rest`. The product with an infinite h may be NaN.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lines = _Lines(context, builder, xs.dtype)
        x = cgutils.unpack_tuple(builder, args[0])
        x = lines.bounded(x, lines.constant(-127.0, -1023.0), lines.constant(128.0, 1024.0))
        rounding = [lines.rounding()] * len(x)
        shifted = lines.sums(x, rounding)
        rests = lines.exp2_less_1(lines.less(x, lines.less(shifted, rounding)))
        return context.make_tuple(builder, sig.return_type, [*lines.powers(shifted), *rests])

    return types.UniTuple(xs.dtype, 2 * xs.count)(xs), codegen


@cache
def _sixteenths() -> tuple[list[int], list[float]]:
    """For j / 16 at place j modulo 16, |j| <= 8: its power of two in float32, and what that lacks, relative to it.

    The power is given as bits that a whole number of sixteenths, moved to where a float32 has its exponent, lacks.
    """
    bits, rests = [], []
    for place in range(16):
        j = place - 16 if place > 8 else place
        exact = 2.0 ** (j / 16)
        near = np.float32(exact)
        bits.append(int(near.view(np.int32)) - int(np.float32(1).view(np.int32)) - (j << 19))
        rests.append(exact / float(near) - 1)
    return bits, rests


@intrinsic
def decays(typingctx: Any, xs: Any) -> Any:
    """`scaled_exp2`, where `power` need be no power of two: it may be 2^x rounded to a sixteenth in x.

    The 16 numbers of a register then make a table, and the rest of x is so small that a short polynomial does. The rest
    has what the number in the table lacks, so that no decay has one and the same error at every step.
    """
    if xs.dtype.element != types.float32 or not processor.has("avx512f"):
        return scaled_exp2._defn(typingctx, xs)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lines = _Lines(context, builder, xs.dtype)
        wide, whole = context.get_value_type(xs.dtype), lines.wide
        bits, lacks = _sixteenths()
        x = lines.bounded(cgutils.unpack_tuple(builder, args[0]), lines.constant(-127.0, 0), lines.constant(128.0, 0))
        rounding = [lines.constant(1.5 * 2**19 + 127, 0)] * len(x)
        shifted = lines.sums(x, rounding)
        places = [builder.bitcast(y, whole) for y in shifted]
        parts = lines.less(x, lines.less(shifted, rounding))
        values = lines.sums(lines.products(parts, [lines.constant(C2, 0)] * len(x)), [lines.constant(C1, 0)] * len(x))
        values = side_by_side(builder, values)
        values = lines.sums(lines.products(values, parts), [lines.constant(C0, 0)] * len(x))
        values = side_by_side(builder, values)
        rests = [_looked_up(builder, ir.Constant(wide, lacks), at) for at in places]
        rests = lines.sums(lines.products(values, parts), rests)
        shift = ir.Constant(whole, [19] * 16)
        powers = [
            builder.bitcast(
                builder.add(builder.shl(at, shift), _looked_up(builder, ir.Constant(whole, bits), at)), wide
            )
            for at in places
        ]
        return context.make_tuple(builder, sig.return_type, [*powers, *rests])

    return types.UniTuple(xs.dtype, 2 * xs.count)(xs), codegen


def _looked_up(builder: Any, table: Any, places: Any) -> Any:
    """The numbers of a table of 16 at these places modulo 16."""
    letter = "f" if table.type.element == ir.FloatType() else "i"
    kind = ir.FunctionType(table.type, [table.type, places.type])
    name = f"llvm.x86.avx512.permvar.s{letter}.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [table, places])


@intrinsic
def exp_negative(typingctx: Any, xs: Any) -> Any:
    """exp(x) of a tuple of vectors x <= 0, within 2 units in the last place; 0 below the normal numbers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lines = _Lines(context, builder, xs.dtype)
        x = lines.bounded(cgutils.unpack_tuple(builder, args[0]), lines.constant(-88.03, -709.09))
        scale, scale_rest = (
            lines.constant(LOG2_E, LOG2_E),
            lines.constant(1.9259629911266175e-8, 2.0355273740931033e-17),
        )
        rounding = [lines.rounding()] * len(x)
        shifted = lines.fused(x, scale, rounding)
        parts = lines.fused(x, scale_rest, lines.fused(x, scale, lines.less(rounding, shifted)))
        powers = lines.powers(shifted)
        return context.make_tuple(builder, xs, lines.sums(lines.products(powers, lines.exp2_less_1(parts)), powers))

    return xs(xs), codegen
