"""Functions of vectors that take one or two instructions of LLVM, lane by lane; sum and maximum over the lanes."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import types
from subquad_numpy.codegen.blocks import function_of, lanes_of_vectors
from subquad_numpy.codegen.vector_type import FUSE, Vector, intrinsic


def _llvm(name: str, flags: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The code generator of the LLVM intrinsic `name`, elementwise over vectors."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = context.get_value_type(sig.return_type)
        letter = "f32" if sig.return_type.element == types.float32 else "f64"
        kind = ir.FunctionType(wide, [wide] * len(args))
        function = function_of(builder.module, kind, f"llvm.{name}.v{sig.return_type.lanes}{letter}")
        return builder.call(function, args, fastmath=flags)

    return codegen


@intrinsic
def rint(x: Vector) -> Any:
    """x rounded to the nearest integer, halves to even."""
    return x(x), _llvm("rint")


@intrinsic
def absolute(x: Vector) -> Any:
    """|x|."""
    return x(x), _llvm("fabs")


@intrinsic
def fma(x: Vector, y: Vector, z: Vector) -> Any:
    """x y + z with exactly one rounding, for error terms; a plain x * y + z is fused only where the machine can."""
    return x(x, y, z), _llvm("fma")


@intrinsic
def product(x: Vector, y: Vector) -> Any:
    """x y rounded, where x * y may be fused with a sum: so that a sum of two products is one number in all places."""
    return x(x, x), lambda context, builder, sig, args: builder.fmul(*args)


def _clamp(predicate: str) -> Callable[..., Any]:
    # code generator of: the bound where x `predicate` bound, else x; a comparison with NaN is false

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        beyond = builder.fcmp_ordered(predicate, args[0], args[1])
        return builder.select(beyond, args[1], args[0])

    return codegen


@intrinsic
def at_least(x: Vector, bound: Any) -> Any:
    """max(x, bound), NaN where x is NaN."""
    return x(x, x), _clamp("<")


@intrinsic
def at_most(x: Vector, bound: Any) -> Any:
    """min(x, bound), NaN where x is NaN."""
    return x(x, x), _clamp(">")


@intrinsic
def where_negative(x: Vector, yes: Vector, no: Vector) -> Any:
    """`yes` where x < 0, else `no`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        negative = builder.fcmp_ordered("<", args[0], ir.Constant(args[0].type, None))
        return builder.select(negative, args[1], args[2])

    return x(x, x, x), codegen


def _by_bits(predicate: str, chosen: Callable[..., Any]) -> Callable[..., Any]:
    # code generator of: compare the first two of `chosen` as whole numbers, take the third or, where false, the fourth

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.VectorType(ir.IntType(sig.return_type.element.bitwidth), sig.return_type.lanes)
        bits = [builder.bitcast(x, wide) for x in args]
        left, right, yes, no = chosen(*bits, ir.Constant(wide, None))
        return builder.bitcast(builder.select(builder.icmp_signed(predicate, left, right), yes, no), args[0].type)

    return codegen


@intrinsic
def positive_part(x: Vector) -> Any:
    """max(x, 0), but 0 for a NaN with a sign. Whole numbers are compared, by other units than those of products."""
    return x(x), _by_bits(">", lambda x, zero: (x, zero, x, zero))


@intrinsic
def where_signed(x: Vector, yes: Vector, no: Vector) -> Any:
    """`yes` where the sign of x is set, be x -0 or NaN, else `no`: one operation less than `where_negative`."""
    return x(x, x, x), _by_bits("<", lambda x, yes, no, zero: (x, zero, yes, no))


@intrinsic
def signs(x: Vector) -> Any:
    """An integer with bit i set where lane i is negative."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        negative = builder.fcmp_ordered("<", args[0], ir.Constant(args[0].type, None))
        return builder.zext(builder.bitcast(negative, ir.IntType(x.lanes)), ir.IntType(64))

    return types.int64(x), codegen


@intrinsic
def lowest_bit(bits: Any) -> Any:
    """The place of the lowest bit that is set, of an integer other than 0."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word, flag = ir.IntType(64), ir.IntType(1)
        function = function_of(builder.module, ir.FunctionType(word, [word, flag]), "llvm.cttz.i64")
        return builder.call(function, [args[0], ir.Constant(flag, True)])

    return types.int64(types.int64), codegen


def _select_zero(when_zero: Callable[..., Any]) -> Callable[..., Any]:
    # code generator of: `when_zero` of the other arguments where the first one is 0, else the second one

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = builder.fcmp_ordered("==", args[0], ir.Constant(args[0].type, None))
        return builder.select(zero, when_zero(builder, *args[1:]), args[1])

    return codegen


@intrinsic
def replace_where_zero(key: Vector, x: Vector, other: Vector) -> Any:
    """`other` where key == 0, else x."""
    return x(x, x, x), _select_zero(lambda *args: args[2])


@intrinsic
def add_where_zero(key: Vector, x: Vector, term: Vector) -> Any:
    """x + term where key == 0, else x."""
    return x(x, x, x), _select_zero(lambda builder, x, term: builder.fadd(x, term, flags=FUSE))


@intrinsic
def scale_by_power(x: Vector, exponent: Vector) -> Any:
    """x 2^exponent for whole exponents, by adding to the exponent bits of x: overflow is not checked.

    A NaN stays a NaN: a NaN exponent converts to an integer without low bits on any machine (0, or only the sign bit).
    """
    mantissa = 23 if x.element == types.float32 else 52

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.VectorType(ir.IntType(x.element.bitwidth), x.lanes)
        shift = ir.Constant(wide, [mantissa] * x.lanes)
        power = builder.shl(builder.fptosi(args[1], wide), shift)
        return builder.bitcast(builder.add(builder.bitcast(args[0], wide), power), args[0].type)

    return x(x, x), codegen


@intrinsic
def bits_where_zero(x: Vector) -> Any:
    """All bits set where x == 0, else none: what `masked` takes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.VectorType(ir.IntType(x.element.bitwidth), x.lanes)
        zero = builder.fcmp_ordered("==", args[0], ir.Constant(args[0].type, None))
        return builder.bitcast(builder.sext(zero, wide), args[0].type)

    return x(x), codegen


@intrinsic
def masked(x: Vector, mask: Vector) -> Any:
    """The bits of x that are set in `mask`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.VectorType(ir.IntType(x.element.bitwidth), x.lanes)
        bits = builder.and_(*[builder.bitcast(arg, wide) for arg in args])
        return builder.bitcast(bits, args[0].type)

    return x(x, x), codegen


@intrinsic
def total(x: Vector) -> Any:
    """The sum of the lanes, added pairwise."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = args[0].type
        letter = "f32" if x.element == types.float32 else "f64"
        kind = ir.FunctionType(wide.element, [wide.element, wide])
        function = function_of(builder.module, kind, f"llvm.vector.reduce.fadd.v{x.lanes}{letter}")
        return builder.call(function, [ir.Constant(wide.element, -0.0), args[0]], fastmath=("reassoc",))

    return x.element(x), codegen


@intrinsic
def largest(x: Vector) -> Any:
    """The maximum of the lanes that are not NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # LLVM's own reduction compares one lane after the other
        found, half = args[0], x.lanes // 2
        letter, one = "f32" if x.element == types.float32 else "f64", found.type.element
        while half:
            kind = ir.VectorType(one, half)
            larger = function_of(builder.module, ir.FunctionType(kind, [kind, kind]), f"llvm.maxnum.v{half}{letter}")
            parts = (lanes_of_vectors(tuple(range(start, start + half))) for start in (0, half))
            found = builder.call(larger, [builder.shuffle_vector(found, found, part) for part in parts])
            half //= 2
        return builder.extract_element(found, ir.Constant(ir.IntType(32), 0))

    return x.element(x), codegen
