"""exp2, softplus, sigmoid and rotations of vectors, by polynomials.

The coefficients interpolate the functions named beside them at Chebyshev nodes, computed in 50 digits, and are within
a small factor of the best possible. The error of a polynomial is below a fifth of a unit in the last place, so the
error of a function is that of its few roundings. Each polynomial has two sets, for float32 and for float64.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import (
    FUSE,
    Vector,
    absolute,
    at_least,
    at_most,
    fma,
    inline,
    intrinsic,
    replace_where_zero,
    rint,
    scale_by_power,
    types,
    where_negative,
)

Coefficients = tuple[float, ...]


def register_constant(context: Any, builder: Any, vector: Vector, value: float) -> Any:
    """A constant vector, hidden from LLVM as the output of empty assembly, so that it stays in a register.

    LLVM would load a known constant from memory at each use inside the loop over states: half of all loads.
    """
    kind, word = context.get_value_type(vector.element), ir.IntType(vector.element.bitwidth)
    with builder.goto_entry_block():
        bits = builder.bitcast(ir.Constant(kind, value), word)
        bits = builder.asm(ir.FunctionType(word, [word]), "", "=r,0", [bits], side_effect=False)
        return context.cast(builder, builder.bitcast(bits, kind), vector.element, vector)


def polynomial(single: Coefficients, double: Coefficients) -> Callable[[Any], Any]:
    """x -> c[0] + c[1] x + c[2] x² + …, by Horner's rule; a single coefficient makes it a constant."""

    @intrinsic
    def evaluate(x: Vector) -> Any:
        coefficients = single if x.element == types.float32 else double

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            terms = [register_constant(context, builder, x, c) for c in coefficients]
            value = terms.pop()
            while terms:
                value = builder.fadd(builder.fmul(value, args[0], flags=FUSE), terms.pop(), flags=FUSE)
            return value

        return x(x), codegen

    return evaluate


# Exponents of two at which scale_by_power gives 0 and infinity: one below the smallest, one above the largest normal.
LOWEST_POWER = polynomial((-127.0,), (-1023.0,))
HIGHEST_POWER = polynomial((128.0,), (1024.0,))
# exp(x) of a smaller x is no normal number, and taken for 0.
LOWEST_EXPONENT = polynomial((-87.0,), (-708.0,))
# ln 2 in two parts; the high part has so few digits that its product with a whole exponent is exact.
LN2_HIGH = polynomial((0.693359375,), (6.93147180369123816490e-01,))
LN2_LOW = polynomial((-2.12194440054690583e-4,), (1.90821492927058770002e-10,))
ZERO = polynomial((0.0,), (0.0,))
ONE = polynomial((1.0,), (1.0,))
LEAST = polynomial((-3.4028234663852886e38,), (-1.7976931348623157e308,))  # stands in for −∞, as −∞ − (−∞) is NaN
SMALLEST = polynomial((2.0**-126,), (2.0**-1022,))  # of the numbers with all digits
MOST = polynomial((2.0**122,), (2.0**1018,))  # a 64th of the range of numbers, of which a few may be added
LOG2_E = 1.4426950408889634

# (2^x - 1) / x for |x| <= 1/2
EXP2 = (
    (0.693147188, 0.2402265076, 0.05550357114, 0.009618082557, 0.001339086336, 0.0001545316295),
    (
        0.69314718055994531, 0.24022650695910098, 0.055504108664821594, 0.0096181291076068885,
        0.0013333558146416935, 0.0001540353044173605, 1.5252733829836118e-5, 1.321544258792169e-6,
        1.0178062445845774e-7, 7.0725859692492237e-9, 4.4549605981865184e-10,
    ),
)  # fmt: skip
_EXP2 = polynomial(*EXP2)

# (2 atanh(s) / s - 2) / s² for s² <= 1/9, in s². Those for float32 make the error of 2 s + s³ P(s²) the least.
ATANH = (
    (0.6666641629, 0.4002152724, 0.280018052, 0.2801198717),
    (
        0.6666666666666615, 0.40000000000185747, 0.28571428545454115, 0.22222224080747673,
        0.18181740832504805, 0.15386614042304008, 0.13300374032674624, 0.12110168728069218,
        0.083245065118608206, 0.17044163562781398,
    ),
)  # fmt: skip
_ATANH = polynomial(*ATANH)

# sin(πx) / x and (cos(πx) - 1) / x² for |x| <= 1/2, in x²
_SIN_PI = polynomial(
    (3.141592654, -5.167712765, 2.550163318, -0.5992521865, 0.0820503502, -0.007028303855),
    (
        3.1415926535897932, -5.16771278004997, 2.5501640398773453, -0.5992645293207869,
        0.082145886610993557, -0.0073704309437021358, 0.00046630278745932727, -2.1915250301851374e-5,
        7.9485390373723208e-7, -2.2283712160696969e-8,
    ),
)  # fmt: skip
_COS_PI = polynomial(
    (-4.934802201, 4.058712123, -1.335262606, 0.2353278494, -0.02578537479, 0.001852590254),
    (
        -4.9348022005446793, 4.0587121264167682, -1.3352627688545895, 0.23533063035889246,
        -0.025806891389994791, 0.0019295743091160257, -0.00010463810230557562, 4.3030548321192548e-6,
        -1.3873925305665263e-7, 3.509698837696498e-9,
    ),
)  # fmt: skip


@inline
def split_exp2(x: Any) -> Any:
    """(factor, whole) that represent 2^x in a recurrence: 2^x h = factor h + (h where whole == 0).

    `whole` is x rounded, and

        whole == 0    factor = 2^x − 1 with all its digits: a slow decay would lose them in a number next to 1, and
                      make one and the same error at every step
        elsewhere     factor = 2^x within 2 units in the last place, 0 below the normal numbers, infinite above

    At the bounds x is whole and the polynomial exactly 1, so that its exponent bits become those of 0 or infinity.
    NaN stays NaN. An infinite h becomes NaN where whole == 0; a bound on h would cost a scan 6 % of its time.
    """
    x = at_most(at_least(x, LOWEST_POWER(x)), HIGHEST_POWER(x))
    whole = rint(x)
    part = x - whole
    q = _EXP2(part)
    return replace_where_zero(whole, scale_by_power(part * q + 1.0, whole), part * q), whole


@inline
def bounded(x: Any) -> Any:
    """`subquad.kernels.max_shift.bounded` of a vector: x within a 64th of the range of its numbers."""
    return at_least(at_most(x, MOST(x)), -MOST(x))


@inline
def exp_negative(x: Any) -> Any:
    """exp(x) for x <= 0."""
    bounded = at_least(x, LOWEST_EXPONENT(x))
    whole = rint(bounded * LOG2_E)
    part = ((bounded - whole * LN2_HIGH(x)) - whole * LN2_LOW(x)) * LOG2_E
    value = scale_by_power(part * _EXP2(part) + 1.0, whole)
    return where_negative(x - LOWEST_EXPONENT(x), ZERO(x), value)


@inline
def softplus(x: Any) -> Any:
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), within 2 units in the last place.

    With s = e / (2 + e), log1p(e) = 2 atanh(s) = 2 s + s³ P(s²). As 2 s = e - e s, a small e keeps all its digits.
    """
    return softplus_from(x, exp_negative(-absolute(x)))


@inline
def softplus_from(x: Any, e: Any) -> Any:
    """`softplus` of x, for e = exp(-|x|)."""
    s = e / (e + 2.0)
    square = s * s
    return at_least(x, ZERO(x)) + (e + s * (square * _ATANH(square) - e))


@inline
def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), with a small relative error also where the value is small."""
    return sigmoid_from(x, exp_negative(-absolute(x)))


@inline
def sigmoid_from(x: Any, e: Any) -> Any:
    """`sigmoid` of x, for e = exp(-|x|)."""
    return where_negative(x, e, ONE(x)) / (e + 1.0)


@inline
def scaled_rotation(rest: Any, time: Any, rate: Any, rate_rest: Any) -> Any:
    """(real less 1, imaginary) part of (1 + rest) exp(i angle), for the `rest` of `scaled_exp2`.

    The angle is 2π time (rate + rate_rest). Whole turns are subtracted first, without rounding. Half of the remaining
    angle is within a quarter turn, and sin 2a = 2 sin a cos a, cos 2a = 1 - 2 sin² a.
    """
    turns = time * rate
    x = (turns - rint(turns)) + (fma(time, rate, -turns) + time * rate_rest)
    square = x * x
    sine = x * _SIN_PI(square)
    cosine = square * _COS_PI(square) + 1.0
    drop = sine * sine * -2.0
    return rest + (rest * drop + drop), (rest * cosine + cosine) * (sine * 2.0)
