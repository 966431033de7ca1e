"""The type of a vector: 64 bytes of float32 or float64 as one value of compiled code, with `+ - * /`."""

import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import extending
from numba.core import types as numba_types
from numba.core.typing import templates

F = TypeVar("F", bound=Callable[..., Any])
types: Any = numba_types
intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = extending.intrinsic
lowers: Callable[..., Callable[[F], F]] = extending.lower_builtin
casts: Callable[..., Callable[[F], F]] = extending.lower_cast

BYTES = 64  # of a vector: the widest register (AVX-512), and a cache line
# A product and a sum may fuse into one rounding. Nothing else is relaxed: NaN and infinity keep their meaning.
FUSE = ("contract",)


def kept(made: Any, *options: object) -> Any:
    """An intrinsic that a factory has made with these options, as other processes will find it on disk.

    Numba looks a kernel up by its closure, in which an intrinsic stands with a random number unless it is given one:
    every process would compile the kernel again.
    """
    with suppress(AttributeError):  # a Numba that numbers intrinsics in another way
        made._set_uuid(f"{made.__module__}.{made.__qualname__} {options}")
    return made


class Vector(types.Type):  # type: ignore[misc]
    """The Numba type of `BYTES` bytes of `element`s held as one value."""

    def __init__(self, element: Any) -> None:
        self.element = element
        self.lanes = BYTES * 8 // element.bitwidth
        super().__init__(name=f"vector({element} x {self.lanes})")


def lanes_of(dtype: Any) -> int:
    """The number of elements of a NumPy `dtype` in one vector."""
    return int(BYTES // dtype.itemsize)


def inline(function: F) -> F:
    """Compile `function` into its callers; unlike Numba's own decorator, `inline` keeps the type for type checkers."""
    compiled: F = numba.njit(inline="always", error_model="numpy")(function)
    return compiled


def merged(function: F) -> F:
    """Compile `function` once for its types, and let LLVM merge it into its callers, with their constants.

    Numba's own inlining copies the caller at each call, which takes seconds in a kernel with large functions.
    """
    compiled: F = numba.njit(forceinline=True, error_model="numpy")(function)
    return compiled


def apart(function: F) -> F:
    """Compile `function` once for its types, and call it: for large functions with several callers."""
    compiled: F = numba.njit(error_model="numpy")(function)
    return compiled


@extending.register_model(Vector)
class _VectorModel(extending.models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = manager.lookup(vector.element).get_value_type()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


class _Arithmetic(templates.AbstractTemplate):  # type: ignore[misc]
    """Typing of `+ - * /` between vectors, or a vector and a scalar, which is spread over the lanes."""

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
def spread_scalar(context: Any, builder: Any, fromty: Any, toty: Vector, value: Any) -> Any:
    # a vector with the scalar `value` in every lane
    scalar = context.cast(builder, value, fromty, toty.element)
    wide = context.get_value_type(toty)
    if isinstance(scalar, ir.Constant):
        return ir.Constant(wide, [scalar] * toty.lanes)
    zero = ir.Constant(ir.IntType(32), 0)
    first = builder.insert_element(ir.Constant(wide, ir.Undefined), scalar, zero)
    return builder.shuffle_vector(
        first, ir.Constant(wide, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), toty.lanes), None)
    )
