"""The type of a vector, 64 bytes of float32 or float64 as one value, and the marks of functions that kernels call."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from llvmlite import ir

from subquad_numpy.codegen import types

F = TypeVar("F", bound=Callable[..., Any])

BYTES = 64  # of a vector: the widest register (AVX-512), and a cache line
# A product and a sum may fuse into one rounding. Nothing else is relaxed: NaN and infinity keep their meaning.
FUSE = ("contract",)


class Vector(types.Type):
    """The type of `BYTES` bytes of `element`s held as one value, or of one of so many equal parts of them."""

    def __init__(self, element: Any, parts: int = 1) -> None:
        self.element = element
        self.lanes = BYTES * 8 // element.bitwidth // parts
        super().__init__(f"vector({element} x {self.lanes})")


def lanes_of(dtype: Any) -> int:
    """The number of elements of a NumPy `dtype` in one vector."""
    return int(BYTES // dtype.itemsize)


class Marked:
    """A function that kernels call, and how: see the marks `inline`, `merged`, `split`, `apart` and `intrinsic`."""

    def __init__(self, function: Callable[..., Any], mark: str) -> None:
        self.function, self.mark = function, mark
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __call__(self, *args: Any) -> Any:
        """Raise TypeError: only kernels call it."""
        msg = f"{self.__name__} exists in compiled code only"
        raise TypeError(msg)


def inline(function: F) -> F:
    """Translate `function` anew at each call, where constants may differ."""
    return Marked(function, "inline")  # type: ignore[return-value]


def merged(function: F) -> F:
    """Translate `function` once for its types and constants, and let LLVM merge it into its callers."""
    return Marked(function, "merged")  # type: ignore[return-value]


def split(function: F) -> F:
    """Translate `function` once for its types and constants, and call it: LLVM takes less time for small functions."""
    return Marked(function, "split")  # type: ignore[return-value]


def apart(function: F) -> F:
    """Translate `function` once for its types, and call it: for large functions with several callers."""
    return Marked(function, "apart")  # type: ignore[return-value]


def intrinsic(function: F) -> F:
    """Mark a function of types that returns a signature and a function which writes the code, or None.

    The latter takes (context, builder, signature, arguments), values of LLVM, and returns such a value.
    """
    return Marked(function, "intrinsic")  # type: ignore[return-value]


@cache
def _spread_constant(vector: Vector, scalar: Any) -> Any:
    # one constant for each number: its text is long, and made once
    return ir.Constant(ir.VectorType(scalar.type, vector.lanes), [scalar] * vector.lanes)


def spread_scalar(context: Any, builder: Any, fromty: Any, toty: Vector, value: Any) -> Any:
    # a vector with the scalar `value` in every lane
    scalar = context.cast(builder, value, fromty, toty.element)
    wide = context.get_value_type(toty)
    if isinstance(scalar, ir.Constant):
        return _spread_constant(toty, scalar)
    zero = ir.Constant(ir.IntType(32), 0)
    first = builder.insert_element(ir.Constant(wide, ir.Undefined), scalar, zero)
    return builder.shuffle_vector(
        first, ir.Constant(wide, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), toty.lanes), None)
    )
