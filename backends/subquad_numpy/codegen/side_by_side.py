"""Exponentials of several vectors, whose chains of dependent operations a machine runs side by side.

A machine starts operations in the order of the program, some sixty ahead of the oldest that waits. An exponential is a
chain of some fifteen operations, each of which waits for the one before: a core has under way only as many chains as
its window holds, and LLVM puts one chain behind the other. Here they advance together, one operation of each chain at a
time: eight registers hide the four cycles of an operation.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir

from subquad_numpy.codegen import processor, types
from subquad_numpy.codegen.blocks import function_of, lanes_of_vectors, parts_of
from subquad_numpy.codegen.vector_math import EXP2, LOG2_E, register_constant
from subquad_numpy.codegen.vector_type import FUSE, intrinsic

# (2^x - 1) / x for |x| <= 1/32, and for |x| <= 1/8, exact at 0: see `vector_math`
EXP2_OF_SIXTEENTHS = (0.6931471805599453, 0.2402335515698872, 0.05550508525196963)
EXP2_OF_QUARTERS = (0.6931471805599453, 0.2402265069591007, 0.05552136359286508, 0.00962012240132137)
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


class _Lines:
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

    def plain_sums(self, xs: list[Any], ys: list[Any]) -> list[Any]:
        """Sums that are fused with no product: the same number with and without bounds."""
        return [self.builder.fadd(x, y) for x, y in zip(xs, ys, strict=True)]

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

    def rounding(self) -> Any:
        """A number plus this one is rounded to a whole number, and has that plus the bias in its lowest bits."""
        return self.constant(1.5 * 2**23 + 127, 1.5 * 2**52 + 1023)


def _parted(xs: Any, by: Callable[[_Lines, list[Any]], list[Any]], is_moderate: bool) -> Any:
    """What an intrinsic returns that takes a tuple of vectors and gives two parts of each, as `by` makes them."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lines = _Lines(context, builder, xs.dtype)
        x = parts_of(builder, args[0])
        if not is_moderate:
            # a table makes no numbers below the normal ones: there, all are taken for the bound, whose power is 0
            edge = None if by is _by_powers else lines.constant(-126.0, -1022.0)
            x = lines.bounded(x, lines.constant(-127.0, -1023.0), lines.constant(128.0, 1024.0), edge)
        return context.make_tuple(builder, sig.return_type, by(lines, x))

    return types.Tuple([xs.dtype] * (2 * xs.count))(xs), codegen


def _by_powers(lines: _Lines, x: list[Any]) -> list[Any]:
    rounding = [lines.rounding()] * len(x)
    shifted = lines.plain_sums(x, rounding)
    rests = lines.exp2_less_1(lines.less(x, lines.less(shifted, rounding)))
    return [*lines.powers(shifted), *rests]


def _by_sixteenths(lines: _Lines, x: list[Any]) -> list[Any]:
    _, lacks = _parts_of_octave(16)
    return _by_parts(lines, x, 16, EXP2_OF_SIXTEENTHS, lines.looked_up, lambda at: lines.looked_up(lacks, at))


def _by_quarters(lines: _Lines, x: list[Any]) -> list[Any]:
    # the float32 of the table lack less than 0.3 units in the last place, which no operation is worth
    return _by_parts(lines, x, 4, EXP2_OF_QUARTERS, lines.looked_up_in_four, None)


def _by_parts(
    lines: _Lines, x: list[Any], count: int, terms: tuple[float, ...], look_up: Callable[..., Any], lacking: Any
) -> list[Any]:
    # by a table of 2^(j / count), and what its numbers lack if that is asked for
    builder, bits = lines.builder, lines.mantissa + 1 - count.bit_length()  # 2^bits has such parts as its last digits
    shift = ir.Constant(lines.wide, [bits] * lines.vector.lanes)
    rounding = [lines.constant(1.5 * 2**bits + 127, 0)] * len(x)
    shifted = lines.plain_sums(x, rounding)
    places = [builder.bitcast(w, lines.wide) for w in shifted]
    parts = lines.less(x, lines.less(shifted, rounding))
    *others, values = ([lines.constant(c, 0)] * len(x) for c in terms)
    for term in reversed(others):
        values = side_by_side(builder, lines.sums(lines.products(values, parts), term))
    rests = lines.products(values, parts)
    if lacking is not None:
        rests = lines.sums(rests, [lacking(at) for at in places])
    table, _ = _parts_of_octave(count)
    powers = [builder.add(builder.shl(at, shift), look_up(table, at)) for at in places]
    return [*(builder.bitcast(power, x[0].type) for power in powers), *rests]


@cache
def _parts_of_octave(count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """For j at place j modulo `count`, |j| <= count / 2: the float32 next to 2^(j / count), and what that lacks.

    The number stands as bits, less those that j itself has where a float32 has its exponent and its first digits. What
    it lacks is relative to it.
    """
    numbers = [place - count if place > count // 2 else place for place in range(count)]
    near = [np.float32(2.0 ** (j / count)) for j in numbers]
    one, of_j = int(np.float32(1).view(np.int32)), (1 << 23) // count
    bits = (int(x.view(np.int32)) - one - j * of_j for x, j in zip(near, numbers, strict=True))
    return tuple(bits), tuple(2.0 ** (j / count) / float(x) - 1 for x, j in zip(near, numbers, strict=True))


@intrinsic
def scaled_exp2(xs: Any) -> Any:
    """The powers, then the rests, of a tuple of vectors x. They represent 2^x in a recurrence: with k = power h,
    2^x h = k + rest k.

    `power` is a power of two, and 1 for |x| < 1/2; `rest` = 2^x / power − 1 has all its digits: a slow decay would lose
    them in a number next to 1, and make one and the same error at every step. 2^x is within 2 units in the last place;
    `power` is 0 where 2^x is below the normal numbers, and infinite from x = 127.5 (1023.5) on. NaN stays NaN, in
    `rest`. The product with an infinite h may be NaN.
    """
    return _parted(xs, _by_powers, False)


@intrinsic
def decays(xs: Any) -> Any:
    """`scaled_exp2`, where `power` need be no power of two: the fastest way of the machine.

    A register of 16 numbers makes a table of the powers of sixteenths. The rest of x then is so small that a polynomial
    of three terms does, and `rest` has what the number in the table lacks too. `power` is 1 for |x| < 1/32. A register
    of eight makes one of the powers of quarters, for a polynomial of four terms; `power` is 1 for |x| < 1/8.
    """
    return _parted(xs, _fastest(xs), False)


@intrinsic
def moderate_decays(xs: Any) -> Any:
    """`decays` for |x| <= 126 (1022): no bounds are needed, a sixth of the operations."""
    return _parted(xs, _fastest(xs), True)


def _fastest(xs: Any) -> Callable[[_Lines, list[Any]], list[Any]]:
    if xs.dtype.element != types.float32:
        return _by_powers
    return _by_sixteenths if processor.has("avx512f") else _by_quarters if processor.has("avx2") else _by_powers


@intrinsic
def exp_negative(xs: Any) -> Any:
    """exp(x) of a tuple of vectors x <= 0, within 2 units in the last place; 0 below the normal numbers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lines = _Lines(context, builder, xs.dtype)
        x = lines.bounded(parts_of(builder, args[0]), lines.constant(-88.03, -709.09))
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
