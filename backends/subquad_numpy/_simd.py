"""Explicit vectors for Numba: 64 bytes of float32 or float64 as one value, with `+ - * /`, loads and stores.

LLVM's own vectoriser guards every loop over arrays with checks for overlap and gives up where the loop is
short; with vectors as values neither happens, and a state can stay in a register. LLVM splits a vector of 64
bytes into what the machine has (one AVX-512 register, two of AVX2, four of NEON or SSE).

Vectors live inside compiled code only. `memory` below is a flat, contiguous Numba array or a pointer; `index`
counts elements, and nothing is checked.
"""

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import extending
from numba.core import cgutils
from numba.core import types as numba_types
from numba.core.typing import templates

F = TypeVar("F", bound=Callable[..., Any])
types: Any = numba_types
intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = extending.intrinsic
lowers: Callable[..., Callable[[F], F]] = extending.lower_builtin
casts: Callable[..., Callable[[F], F]] = extending.lower_cast

BYTES = 64

# Products and sums may fuse into one rounding. Nothing else is relaxed: NaN and infinity keep their meaning.
FUSE = ("contract",)


class Vector(types.Type):  # type: ignore[misc]
    """Type of `BYTES` worth of `element`s held as one value."""

    def __init__(self, element: Any) -> None:
        self.element = element
        self.lanes = BYTES * 8 // element.bitwidth
        super().__init__(name=f"vector({element} x {self.lanes})")


def lanes_of(dtype: Any) -> int:
    """Number of elements of a NumPy `dtype` in one vector."""
    return int(BYTES // dtype.itemsize)


def inline(function: F) -> F:
    """Compile `function` into its callers; unlike a bare decorator of Numba it keeps the type."""
    compiled: F = numba.njit(inline="always", error_model="numpy")(function)
    return compiled


@extending.register_model(Vector)
class _VectorModel(extending.models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = manager.lookup(vector.element).get_value_type()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


class _Arithmetic(templates.AbstractTemplate):  # type: ignore[misc]
    """Vector with vector, or vector with scalar on either side: the scalar is spread over the lanes."""

    def generic(self, args: tuple[Any, ...], kws: dict[str, Any]) -> Any:
        vectors = [arg for arg in args if isinstance(arg, Vector)]
        others = [arg for arg in args if not isinstance(arg, (Vector, types.Float, types.Integer))]
        if kws or others or not vectors or any(vector != vectors[0] for vector in vectors):
            return None
        return templates.signature(vectors[0], *[vectors[0] for _ in args])


for _operation in (operator.add, operator.sub, operator.mul, operator.truediv, operator.neg):
    templates.infer_global(_operation)(type("_Arithmetic", (_Arithmetic,), {"key": _operation}))


@lowers(operator.add, Vector, Vector)
def _add(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fadd(*args, flags=FUSE)


@lowers(operator.sub, Vector, Vector)
def _sub(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fsub(*args, flags=FUSE)


@lowers(operator.mul, Vector, Vector)
def _mul(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fmul(*args, flags=FUSE)


@lowers(operator.truediv, Vector, Vector)
def _div(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fdiv(*args)


@lowers(operator.neg, Vector)
def _neg(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fneg(*args)


@casts(types.Float, Vector)
@casts(types.Integer, Vector)
def _spread(context: Any, builder: Any, fromty: Any, toty: Vector, value: Any) -> Any:
    scalar = context.cast(builder, value, fromty, toty.element)
    wide = context.get_value_type(toty)
    if isinstance(scalar, ir.Constant):
        return ir.Constant(wide, [scalar] * toty.lanes)
    zero = ir.Constant(ir.IntType(32), 0)
    first = builder.insert_element(ir.Constant(wide, ir.Undefined), scalar, zero)
    return builder.shuffle_vector(
        first, ir.Constant(wide, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), toty.lanes), None)
    )


def _address(context: Any, builder: Any, memory_type: Any, memory: Any, index: Any) -> Any:
    if isinstance(memory_type, types.Array):
        memory = context.make_array(memory_type)(context, builder, memory).data
    return builder.gep(memory, [index])


@intrinsic
def load(typingctx: Any, memory: Any, index: Any) -> Any:
    """The vector at memory[index], memory[index + 1], …"""
    vector = Vector(memory.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], *args)
        address = builder.bitcast(address, context.get_value_type(vector).as_pointer())
        return builder.load(address, align=vector.element.bitwidth // 8)

    return vector(memory, types.intp), codegen


@intrinsic
def store(typingctx: Any, memory: Any, index: Any, value: Vector) -> Any:
    """Write a vector to memory[index], memory[index + 1], …"""
    if not isinstance(value, Vector) or value.element != memory.dtype:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], *args[:2])
        address = builder.bitcast(address, context.get_value_type(value).as_pointer())
        builder.store(args[2], address, align=value.element.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(memory, types.intp, value), codegen


@intrinsic
def spread(typingctx: Any, memory: Any, index: Any) -> Any:
    """A vector with memory[index] in every lane."""
    vector = Vector(memory.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scalar = builder.load(_address(context, builder, sig.args[0], *args))
        return _spread(context, builder, vector.element, vector, scalar)

    return vector(memory, types.intp), codegen


@intrinsic
def zeros(typingctx: Any, memory: Any) -> Any:
    """A vector of zeros, of the element type of `memory`."""
    vector = Vector(memory.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(vector), None)

    return vector(memory), codegen


@intrinsic
def pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """An integer address as a pointer to elements of the type of the scalar `like`."""
    target = types.CPointer(like)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(target))

    return target(types.uintp, like), codegen


@intrinsic
def shifted(typingctx: Any, memory: Any, count: Any) -> Any:
    """The pointer `count` elements further on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return memory(memory, types.intp), codegen


@intrinsic
def aligned(typingctx: Any, buffer: Any) -> Any:
    """Pointer to the first element of `buffer` on a boundary of `BYTES`.

    Helpers take it instead of the array because an array passed along is counted, and the calls that count it
    push everything out of the vector registers. `buffer` must be used once more after the last use of the
    pointer.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        address = builder.ptrtoint(data, cgutils.intp_t)
        gap = builder.and_(builder.neg(address), ir.Constant(cgutils.intp_t, BYTES - 1))
        return builder.inttoptr(builder.add(address, gap), data.type)

    return types.CPointer(buffer.dtype)(buffer), codegen


@intrinsic
def prefetch(typingctx: Any, memory: Any, index: Any) -> Any:
    """Ask for the cache line of memory[index], which need not exist."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], *args)
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = 0, 3, 1
        hints = [ir.Constant(word, hint) for hint in (read, keep, data)]
        builder.call(function, [builder.bitcast(address, byte), *hints])
        return context.get_dummy_value()

    return types.none(memory, types.intp), codegen


def _llvm(name: str, flags: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Code generator of the LLVM intrinsic `name`, elementwise over vectors."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = context.get_value_type(sig.return_type)
        letter = "f32" if sig.return_type.element == types.float32 else "f64"
        kind = ir.FunctionType(wide, [wide] * len(args))
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{sig.return_type.lanes}{letter}")
        return builder.call(function, args, fastmath=flags)

    return codegen


@intrinsic
def rint(typingctx: Any, x: Vector) -> Any:
    """Nearest integer, halves to even."""
    return x(x), _llvm("rint")


@intrinsic
def absolute(typingctx: Any, x: Vector) -> Any:
    """|x|."""
    return x(x), _llvm("fabs")


@intrinsic
def fma(typingctx: Any, x: Vector, y: Vector, z: Vector) -> Any:
    """x y + z with one rounding, always: for error terms. Elsewhere x * y + z fuses where the machine can."""
    return x(x, y, z), _llvm("fma")


def _clamp(predicate: str) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        beyond = builder.fcmp_ordered(predicate, args[0], args[1])
        return builder.select(beyond, args[1], args[0])

    return codegen


@intrinsic
def at_least(typingctx: Any, x: Vector, bound: Any) -> Any:
    """max(x, bound), NaN where x is NaN."""
    return x(x, x), _clamp("<")


@intrinsic
def at_most(typingctx: Any, x: Vector, bound: Any) -> Any:
    """min(x, bound), NaN where x is NaN."""
    return x(x, x), _clamp(">")


@intrinsic
def where_negative(typingctx: Any, x: Vector, yes: Vector, no: Vector) -> Any:
    """`yes` where x < 0, else `no`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        negative = builder.fcmp_ordered("<", args[0], ir.Constant(args[0].type, None))
        return builder.select(negative, args[1], args[2])

    return x(x, x, x), codegen


def _select_zero(when_zero: Callable[..., Any]) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = builder.fcmp_ordered("==", args[0], ir.Constant(args[0].type, None))
        return builder.select(zero, when_zero(builder, *args[1:]), args[1])

    return codegen


@intrinsic
def replace_where_zero(typingctx: Any, key: Vector, x: Vector, other: Vector) -> Any:
    """`other` where key == 0, else x."""
    return x(x, x, x), _select_zero(lambda *args: args[2])


@intrinsic
def add_where_zero(typingctx: Any, key: Vector, x: Vector, term: Vector) -> Any:
    """x + term where key == 0, else x."""
    return x(x, x, x), _select_zero(lambda builder, x, term: builder.fadd(x, term, flags=FUSE))


@intrinsic
def scale_by_power(typingctx: Any, x: Vector, exponent: Vector) -> Any:
    """x 2^exponent for whole exponents, by adding to the exponent bits of x: nothing is checked.

    A NaN stays a NaN: its conversion to an integer has no low bits set on any machine (0, or only the sign
    bit).
    """
    mantissa = 23 if x.element == types.float32 else 52

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.VectorType(ir.IntType(x.element.bitwidth), x.lanes)
        shift = ir.Constant(wide, [mantissa] * x.lanes)
        power = builder.shl(builder.fptosi(args[1], wide), shift)
        return builder.bitcast(builder.add(builder.bitcast(args[0], wide), power), args[0].type)

    return x(x, x), codegen


@intrinsic
def total(typingctx: Any, x: Vector) -> Any:
    """Sum over the lanes, pairwise."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = args[0].type
        letter = "f32" if x.element == types.float32 else "f64"
        kind = ir.FunctionType(wide.element, [wide.element, wide])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{x.lanes}{letter}")
        return builder.call(function, [ir.Constant(wide.element, -0.0), args[0]], fastmath=("reassoc",))

    return x.element(x), codegen


@intrinsic
def largest(typingctx: Any, x: Vector) -> Any:
    """Largest of the lanes that are not NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = args[0].type
        letter = "f32" if x.element == types.float32 else "f64"
        kind = ir.FunctionType(wide.element, [wide])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fmax.v{x.lanes}{letter}")
        return builder.call(function, args)

    return x.element(x), codegen
