"""Arithmetic of values. Types mix as Numba has it.

An operation of an integer with a float32 is one of float64s, two float32s stay float32, and a vector takes a number in
every lane.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import types
from subquad_numpy.codegen.blocks import function_of
from subquad_numpy.codegen.values import CONTEXT, WORD, Value, cast, machine_type, materialised, type_of, unified
from subquad_numpy.codegen.vector_type import FUSE, Vector


def _kind_of_operation(a: Any, b: Any) -> Any:
    """The type in which an operation on two types is done."""
    for kind in (a, b):
        if isinstance(kind, (Vector, types.Complex)):
            return kind
    if isinstance(a, types.Float) or isinstance(b, types.Float):
        return types.float32 if a == b == types.float32 else types.float64
    return types.int64


_FLOATS: dict[Any, str] = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
_INTEGERS: dict[Any, str] = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.and_: "and_", operator.or_: "or_",
    operator.xor: "xor", operator.lshift: "shl", operator.rshift: "ashr",
}  # fmt: skip


def operate(builder: Any, operation: Any, left: Any, right: Any) -> Any:
    """A binary operation on two values, of which at least one is not a constant."""
    kind = _kind_of_operation(type_of(left), type_of(right))
    if operation is operator.truediv and kind == types.int64:
        kind = types.float64
    if operation is operator.pow:
        kind = types.float64 if kind == types.int64 else kind
        return call_llvm(
            builder, "pow", kind, Value(kind, cast(builder, left, kind)), Value(kind, cast(builder, right, kind))
        )
    a, b = cast(builder, left, kind), cast(builder, right, kind)
    if isinstance(kind, Vector):
        flags = () if operation is operator.truediv else FUSE
        return Value(kind, getattr(builder, _FLOATS[operation])(a, b, flags=flags))
    if isinstance(kind, types.Complex):
        return Value(kind, _complex(builder, operation, a, b))
    if isinstance(kind, types.Float):
        if operation in (operator.floordiv, operator.mod):
            msg = "kernels have no // and % of floats"
            raise TypeError(msg)
        return Value(kind, getattr(builder, _FLOATS[operation])(a, b))
    if operation in (operator.floordiv, operator.mod):
        return Value(kind, _divided(builder, a, b, operation is operator.mod))
    both_bits = type_of(left) == type_of(right) == types.boolean and operation in (operator.and_, operator.or_)
    if both_bits:
        a, b, kind = materialised(builder, left).ir, materialised(builder, right).ir, types.boolean
    return Value(kind, getattr(builder, _INTEGERS[operation])(a, b))


def _divided(builder: Any, a: Any, b: Any, rest: bool) -> Any:
    """The quotient of integers rounded down, or the rest; a division by 0 gives what one by 1 does."""
    zero, one = ir.Constant(WORD, 0), ir.Constant(WORD, 1)
    if not isinstance(b, ir.Constant):
        b = builder.select(builder.icmp_signed("==", b, zero), one, b)
    quotient, left = builder.sdiv(a, b), builder.srem(a, b)
    # C rounds towards 0: one less where the rest is not 0 and has another sign than b
    differs = builder.icmp_signed("<", builder.xor(left, b), zero)
    adjusts = builder.and_(builder.icmp_signed("!=", left, zero), differs)
    if rest:
        return builder.add(left, builder.select(adjusts, b, zero))
    return builder.sub(quotient, builder.zext(adjusts, WORD))


def _complex(builder: Any, operation: Any, a: Any, b: Any) -> Any:
    (a_real, a_imag), (b_real, b_imag) = ([builder.extract_value(x, i) for i in (0, 1)] for x in (a, b))
    if operation is operator.mul:
        real = builder.fsub(builder.fmul(a_real, b_real), builder.fmul(a_imag, b_imag))
        imag = builder.fadd(builder.fmul(a_real, b_imag), builder.fmul(a_imag, b_real))
    else:
        real, imag = (getattr(builder, _FLOATS[operation])(x, y) for x, y in ((a_real, b_real), (a_imag, b_imag)))
    return CONTEXT.make_tuple(builder, None, [real, imag])


def compare(builder: Any, sign: str, left: Any, right: Any) -> Any:
    """A comparison as one bit; one with NaN is false, but for `!=`."""
    a, b = type_of(left), type_of(right)
    kind = _kind_of_operation(a, b)
    x, y = cast(builder, left, kind), cast(builder, right, kind)
    if isinstance(kind, types.Float):
        return builder.fcmp_unordered(sign, x, y) if sign == "!=" else builder.fcmp_ordered(sign, x, y)
    return builder.icmp_signed(sign, x, y)


def negative(builder: Any, value: Any) -> Any:
    """−x."""
    kind, given = materialised(builder, value)
    if isinstance(kind, types.Complex):
        return Value(
            kind, CONTEXT.make_tuple(builder, kind, [builder.fneg(builder.extract_value(given, i)) for i in (0, 1)])
        )
    if isinstance(kind, (Vector, types.Float)):
        return Value(kind, builder.fneg(given))
    return Value(types.int64, builder.neg(cast(builder, value, types.int64)))


def call_llvm(builder: Any, name: str, kind: Any, *args: Any) -> Value:
    """A function of LLVM of numbers of one type, such as `log`."""
    letter, machine = ("f32" if kind == types.float32 else "f64"), machine_type(kind)
    function = function_of(builder.module, ir.FunctionType(machine, [machine] * len(args)), f"llvm.{name}.{letter}")
    return Value(kind, builder.call(function, [arg.ir for arg in args]))


def absolute_of(builder: Any, value: Any) -> Value:
    """|x| of a number."""
    kind, given = materialised(builder, value)
    if isinstance(kind, types.Float):
        return call_llvm(builder, "fabs", kind, Value(kind, given))
    word = cast(builder, value, types.int64)
    return Value(
        types.int64, builder.select(builder.icmp_signed("<", word, ir.Constant(WORD, 0)), builder.neg(word), word)
    )


def extreme(builder: Any, sign: str, values: list[Any]) -> Any:
    """The maximum (`sign` is ">") or minimum: a number takes the place of the one before if it lies beyond."""
    found = values[0]
    for value in values[1:]:
        kind = unified(type_of(found), type_of(value))
        best, other = (Value(kind, cast(builder, x, kind)) for x in (found, value))
        found = Value(kind, builder.select(compare(builder, sign, other, best), other.ir, best.ir))
    return found
