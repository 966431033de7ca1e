"""Values of a kernel while it is translated: constants, numbers and pointers of the machine, and tuples of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from subquad_numpy.codegen import types
from subquad_numpy.codegen.types import from_dtype
from subquad_numpy.codegen.vector_type import Vector, spread_scalar

WORD, BIT, BYTE = ir.IntType(64), ir.IntType(1), ir.IntType(8)


class Constant(NamedTuple):
    """A Python object that is known while the kernel is translated: a number, a function, a type, …"""

    value: Any


class Value(NamedTuple):
    """A value of the machine: its type and LLVM's name for it. An array is the address of its first element."""

    type: Any
    ir: Any


class Together(NamedTuple):
    """A tuple, or a named tuple of class `kind`, whose parts are values of any sort."""

    kind: Any
    parts: tuple[Any, ...]


class Record(types.Type):
    """The type of an argument record: int64 numbers by name."""

    def __init__(self, fields: tuple[str, ...]) -> None:
        self.fields = fields
        super().__init__(f"record{fields}")


class Context:
    """What the code generators of intrinsics ask for."""

    def get_value_type(self, kind: Any) -> Any:
        """The LLVM type of values of a type."""
        return machine_type(kind)

    def cast(self, builder: Any, value: Any, source: Any, target: Any) -> Any:
        """A value converted to another type."""
        return cast(builder, Value(source, value), target)

    def get_dummy_value(self) -> Any:
        """The value of nothing."""
        return ir.Constant(BYTE, 0)

    def make_array(self, kind: Any) -> Callable[..., Any]:
        """A function of an array, whose result has its address as `data`."""
        return lambda context, builder, value: SimpleNamespace(data=value)

    def make_tuple(self, builder: Any, kind: Any, parts: Any) -> Any:
        """A tuple as one value of LLVM."""
        whole = ir.Constant(ir.LiteralStructType([part.type for part in parts]), ir.Undefined)
        for i, part in enumerate(parts):
            whole = builder.insert_value(whole, part, i)
        return whole


CONTEXT = Context()


def machine_type(kind: Any) -> Any:
    """The LLVM type of values of a type."""
    if isinstance(kind, Vector):
        return ir.VectorType(machine_type(kind.element), kind.lanes)
    if isinstance(kind, types.Boolean):
        return BIT
    if isinstance(kind, types.Integer):
        return ir.IntType(kind.bitwidth)
    if isinstance(kind, types.Float):
        return ir.FloatType() if kind.bitwidth == 32 else ir.DoubleType()
    if isinstance(kind, types.Complex):
        part = machine_type(kind.underlying_float)
        return ir.LiteralStructType([part, part])
    if isinstance(kind, Record) or (isinstance(kind, types.CPointer) and isinstance(kind.dtype, Record)):
        return WORD.as_pointer()
    if isinstance(kind, (types.CPointer, types.Array)):
        return machine_type(kind.dtype).as_pointer()
    if isinstance(kind, types.Tuple):
        return ir.LiteralStructType([machine_type(part) for part in kind])
    msg = f"values of type {kind} do not exist in kernels"
    raise TypeError(msg)


def type_of(value: Any) -> Any:
    """The type of a value as an argument of an intrinsic."""
    if isinstance(value, Value):
        return value.type
    if isinstance(value, Together):
        return types.Tuple([type_of(part) for part in value.parts])
    found = value.value
    if isinstance(found, (bool, np.bool_)):
        return types.boolean
    if isinstance(found, np.generic):
        return from_dtype(found.dtype)
    if isinstance(found, int):
        return types.int64
    if isinstance(found, float):
        return types.float64
    if isinstance(found, tuple):
        return types.Tuple([type_of(Constant(part)) for part in found])
    return types.none


def is_number(value: Any) -> bool:
    """Whether a constant is a number, which a variable may hold."""
    return isinstance(value, Constant) and isinstance(value.value, (bool, int, float, np.generic))


def materialised(builder: Any, value: Any) -> Value:
    """A value as one of the machine."""
    if isinstance(value, Value):
        return value
    kind = type_of(value)
    if isinstance(value, Together) or isinstance(kind, types.Tuple):
        parts = [materialised(builder, part) for part in parts_of(value)]
        return Value(
            types.Tuple([part.type for part in parts]), CONTEXT.make_tuple(builder, kind, [x.ir for x in parts])
        )
    if kind is types.none:
        return Value(kind, CONTEXT.get_dummy_value())
    if isinstance(kind, types.Complex):
        part = machine_type(kind.underlying_float)
        return Value(
            kind,
            ir.Constant(
                machine_type(kind), [ir.Constant(part, float(x)) for x in (value.value.real, value.value.imag)]
            ),
        )
    number = value.value.item() if isinstance(value.value, np.generic) else value.value
    return Value(kind, ir.Constant(machine_type(kind), number))


def run_time(builder: Any, value: Any) -> Any:
    """A value whose numbers are values of the machine, whether they are known or not."""
    if isinstance(value, Together):
        return Together(value.kind, tuple(run_time(builder, part) for part in value.parts))
    return materialised(builder, value) if is_number(value) else value


def parts_of(value: Any) -> tuple[Any, ...]:
    """The parts of a tuple."""
    if isinstance(value, Together):
        return value.parts
    return tuple(Constant(part) for part in value.value)


def are_alike(a: Any, b: Any) -> bool:
    """Whether one variable can hold values of both types."""
    try:
        unified(a, b)
    except TypeError:
        return False
    return True


def unified(a: Any, b: Any) -> Any:
    """The type of a variable that is given values of both types."""
    if a == b:
        return a
    for one, other in ((a, b), (b, a)):
        if isinstance(one, types.Complex) and isinstance(other, (types.Number, types.Boolean)):
            return one
    if isinstance(a, types.Float) and isinstance(b, types.Float):
        return types.float64
    if isinstance(a, (types.Float, types.Integer, types.Boolean)) and isinstance(
        b, (types.Float, types.Integer, types.Boolean)
    ):
        return types.float64 if isinstance(a, types.Float) or isinstance(b, types.Float) else types.int64
    if (
        isinstance(a, (types.CPointer, types.Array))
        and isinstance(b, (types.CPointer, types.Array))
        and (a.dtype, a.parts) == (b.dtype, b.parts)
    ):
        return types.CPointer(a.dtype, a.parts)
    msg = f"a variable cannot be both {a} and {b}"
    raise TypeError(msg)


def cast(builder: Any, value: Any, target: Any) -> Any:
    """The LLVM value of `value` converted to the type `target`."""
    if (
        is_number(value)
        and isinstance(target, (types.Integer, types.Float))
        and not isinstance(value.value, np.complexfloating)
    ):
        number = float(value.value) if isinstance(target, types.Float) else int(value.value)
        return ir.Constant(machine_type(target), number)
    source, given = materialised(builder, value)
    if source == target:
        return given
    kind = machine_type(target)
    if isinstance(target, Vector):
        return spread_scalar(CONTEXT, builder, source, target, given)
    if isinstance(target, types.Boolean):
        return truth(builder, Value(source, given))
    if isinstance(target, types.Complex):
        part = target.underlying_float
        real = cast(builder, Value(source, given), part)
        return builder.insert_value(ir.Constant(kind, [ir.Constant(machine_type(part), 0.0)] * 2), real, 0)
    if isinstance(source, (types.CPointer, types.Array)) and isinstance(target, (types.CPointer, types.Array)):
        return given if given.type == kind else builder.bitcast(given, kind)
    if isinstance(source, types.Tuple) and isinstance(target, types.Tuple):
        parts = [
            cast(builder, Value(one, builder.extract_value(given, i)), other)
            for i, (one, other) in enumerate(zip(source, target, strict=True))
        ]
        return CONTEXT.make_tuple(builder, target, parts)
    is_signed = isinstance(source, types.Integer) and source.signed
    if isinstance(target, types.Float):
        if isinstance(source, types.Float):
            return builder.fpext(given, kind) if target.bitwidth > source.bitwidth else builder.fptrunc(given, kind)
        return builder.sitofp(given, kind) if is_signed else builder.uitofp(given, kind)
    if isinstance(target, types.Integer):
        if isinstance(source, types.Float):
            return builder.fptosi(given, kind) if target.signed else builder.fptoui(given, kind)
        if isinstance(source, (types.Integer, types.Boolean)):
            if given.type.width == kind.width:
                return given
            if given.type.width > kind.width:
                return builder.trunc(given, kind)
            return builder.sext(given, kind) if is_signed else builder.zext(given, kind)
    msg = f"a value of type {source} cannot become one of type {target}"
    raise TypeError(msg)


def truth(builder: Any, value: Any) -> Any:
    """Whether a value is not 0, as one bit."""
    kind, given = materialised(builder, value)
    if isinstance(kind, types.Boolean):
        return given
    if isinstance(kind, types.Float):
        return builder.fcmp_unordered("!=", given, ir.Constant(given.type, 0.0))
    return builder.icmp_signed("!=", given, ir.Constant(given.type, 0))


def leaves(value: Any) -> Iterator[Value]:
    """The values of the machine that a value consists of."""
    if isinstance(value, Value):
        yield value
    elif isinstance(value, Together):
        for part in value.parts:
            yield from leaves(part)


def rebuilt(value: Any, parts: Iterator[Value]) -> Any:
    """A value of the same form of other values of the machine."""
    if isinstance(value, Value):
        return next(parts)
    if isinstance(value, Together):
        return Together(value.kind, tuple(rebuilt(part, parts) for part in value.parts))
    return value


def form(value: Any) -> Any:
    """The types and constants that a value consists of."""
    if isinstance(value, Value):
        return value.type
    if isinstance(value, Together):
        return value.kind, tuple(map(form, value.parts))
    return type(value.value), value.value
