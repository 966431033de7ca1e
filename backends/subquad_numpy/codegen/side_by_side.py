"""Exponentials and logarithms of several vectors, whose chains of dependent operations a machine runs side by side.

`lines` says why, and how.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir

from subquad_numpy.codegen import processor, types
from subquad_numpy.codegen.blocks import parts_of
from subquad_numpy.codegen.lines import Lines, side_by_side
from subquad_numpy.codegen.vector_math import ATANH, EXP2, LOG2_E
from subquad_numpy.codegen.vector_type import intrinsic

# of exp, in float32 and in float64: 0 at the one, and no overflow at the other
LEAST_EXPONENT, MOST_EXPONENT = ((-88.03,), (-709.09,)), ((88.3,), (709.0,))
# (2^x - 1) / x for |x| <= 1/32, and for |x| <= 1/8, exact at 0: see `vector_math`
EXP2_OF_SIXTEENTHS = (0.6931471805599453, 0.2402335515698872, 0.05550508525196963)
EXP2_OF_QUARTERS = (0.6931471805599453, 0.2402265069591007, 0.05552136359286508, 0.00962012240132137)


def _parted(xs: Any, by: Callable[[Lines, list[Any]], list[Any]], is_moderate: bool) -> Any:
    """What an intrinsic returns that takes a tuple of vectors and gives two parts of each, as `by` makes them."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lines = Lines(context, builder, xs.dtype)
        x = parts_of(builder, args[0])
        if not is_moderate:
            # a table makes no numbers below the normal ones: there, all are taken for the bound, whose power is 0
            edge = None if by is _by_powers else lines.constant(-126.0, -1022.0)
            x = lines.bounded(x, lines.constant(-127.0, -1023.0), lines.constant(128.0, 1024.0), edge)
        return context.make_tuple(builder, sig.return_type, by(lines, x))

    return types.Tuple([xs.dtype] * (2 * xs.count))(xs), codegen


def _by_powers(lines: Lines, x: list[Any]) -> list[Any]:
    return [y for part in _of_powers(lines, *_rounded(lines, x, 1)) for y in part]


def _by_sixteenths(lines: Lines, x: list[Any]) -> list[Any]:
    shifted, rests = _rounded(lines, x, 16)
    table, lacks = _parts_of_octave(16)
    powers, rests = _of_parts(lines, shifted, rests, 16, EXP2_OF_SIXTEENTHS, table, lines.looked_up)
    return [*powers, *lines.sums(rests, [lines.looked_up(lacks, lines.as_whole(at)) for at in shifted])]


def _by_quarters(lines: Lines, x: list[Any]) -> list[Any]:
    # the float32 of the table lack less than 0.3 units in the last place, which no operation is worth
    return [y for part in _of_quarters(lines, *_rounded(lines, x, 4)) for y in part]


def _rounded(lines: Lines, x: list[Any], parts: int) -> tuple[list[Any], list[Any]]:
    # x rounded to multiples of 1 / parts, as digits, and what is left of it
    rounding = [lines.rounding(parts)] * len(x)
    shifted = lines.plain_sums(x, rounding)
    return shifted, lines.less(x, lines.less(shifted, rounding))


def _of_powers(lines: Lines, shifted: list[Any], left: list[Any]) -> tuple[list[Any], list[Any]]:
    return lines.powers(shifted), lines.products(left, lines.polynomial(left, *EXP2))


def _of_quarters(lines: Lines, shifted: list[Any], left: list[Any]) -> tuple[list[Any], list[Any]]:
    return _of_parts(lines, shifted, left, 4, EXP2_OF_QUARTERS, _parts_of_octave(4)[0], lines.looked_up_in_four)


def _of_parts(
    lines: Lines, shifted: list[Any], left: list[Any], count: int, terms: tuple[float, ...], table: tuple[int, ...],
    look_up: Callable[..., Any],
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    # by a table of 2^(j / count); its rounding errors are not in the rests
    shift = ir.Constant(lines.wide, [lines.mantissa + 1 - count.bit_length()] * lines.vector.lanes)
    rests = lines.products(lines.polynomial(left, terms, terms), left)
    places = [lines.as_whole(at) for at in shifted]
    powers = [lines.builder.add(lines.builder.shl(at, shift), look_up(table, at)) for at in places]
    return [lines.builder.bitcast(power, left[0].type) for power in powers], rests


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


def _fastest(xs: Any) -> Callable[[Lines, list[Any]], list[Any]]:
    if xs.dtype.element != types.float32:
        return _by_powers
    return _by_sixteenths if processor.has("avx512f") else _by_quarters if processor.has("avx2") else _by_powers


@intrinsic
def exp_negative(xs: Any) -> Any:
    """exp(x) of a tuple of vectors x <= 0, within 2 units in the last place; 0 below the normal numbers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lines = Lines(context, builder, xs.dtype)
        x = lines.bounded(parts_of(builder, args[0]), lines.constant(*(least for (least,) in LEAST_EXPONENT)))
        return context.make_tuple(builder, xs, _exp(lines, x, 1, _of_powers))

    return xs(xs), codegen


@intrinsic
def moderate_exp(xs: Any) -> Any:
    """exp(x) of a tuple of vectors `LEAST_EXPONENT` <= x <= `MOST_EXPONENT`, within 2 units in the last place.

    It is 0 at the lower bound; where exp(x) is below the normal numbers, so is the result.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        by_quarters = _fastest(xs) is _by_quarters
        parts, of_parts = (4, _of_quarters) if by_quarters else (1, _of_powers)
        made = _exp(Lines(context, builder, xs.dtype), parts_of(builder, args[0]), parts, of_parts)
        return context.make_tuple(builder, xs, made)

    return xs(xs), codegen


def _exp(lines: Lines, x: list[Any], parts: int, of_parts: Callable[..., tuple[list[Any], list[Any]]]) -> list[Any]:
    # exp(x) by the powers and rests that `of_parts` gives
    scale, scale_rest = lines.constant(LOG2_E, LOG2_E), lines.constant(1.9259629911266175e-8, 2.0355273740931033e-17)
    rounding = [lines.rounding(parts)] * len(x)
    shifted = lines.fused(x, scale, rounding)
    left = lines.fused(x, scale_rest, lines.fused(x, scale, lines.less(rounding, shifted)))
    powers, rests = of_parts(lines, shifted, left)
    return lines.sums(lines.products(powers, rests), powers)


@intrinsic
def log1p_to_1(xs: Any) -> Any:
    """log(1 + x) of a tuple of vectors 0 <= x <= 1, as `vector_math.softplus` computes it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lines, x = Lines(context, builder, xs.dtype), parts_of(builder, args[0])
        s = lines.quotients(x, lines.sums(x, [lines.constant(2.0, 2.0)] * len(x)))
        squares = side_by_side(builder, lines.products(s, s))
        bent = lines.products(squares, lines.polynomial(squares, *ATANH))
        return context.make_tuple(builder, xs, lines.sums(lines.products(s, lines.fused_less(bent, x)), x))

    return xs(xs), codegen
