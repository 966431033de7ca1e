"""Rows of float32 in two arrays of 16 bits: the upper halves of all numbers in one, the lower halves in the other.

An output of half precision thus holds one half of what becomes it: no second array of float32 is needed beside it.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import product, types, zeros
from subquad_numpy.codegen.halves import HALF_BITS, filled, like
from subquad_numpy.codegen.pointers import load, store
from subquad_numpy.codegen.vector_type import Vector, apart, intrinsic


def _places(builder: Any, args: Any, lanes: int) -> list[Any]:
    """The addresses of both halves of the numbers from an index on; `args` begins (upper, lower, index)."""
    short, (upper, lower, index) = ir.IntType(HALF_BITS), args[:3]
    starts = (builder.gep(builder.bitcast(x, short.as_pointer()), [index]) for x in (upper, lower))
    return [builder.bitcast(start, like(short, lanes).as_pointer()) for start in starts]


def _join(lanes_of: Callable[[Any], int]) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes, kind = lanes_of(sig.args[0].dtype), context.get_value_type(sig.return_type)
        if sig.args[0].dtype != types.float32:  # kernels of other dtypes keep no halves
            return ir.Constant(kind, ir.Undefined)
        word = like(ir.IntType(32), lanes)
        parts = (builder.load(place, align=2) for place in _places(builder, args, lanes))
        upper, lower = (builder.zext(part, word) for part in parts)
        bits = builder.or_(builder.shl(upper, filled(ir.IntType(32), lanes, HALF_BITS)), lower)
        return builder.bitcast(bits, kind)

    return codegen


def _cut(lanes_of: Callable[[Any], int]) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes = lanes_of(sig.args[0].dtype)
        if sig.args[0].dtype == types.float32:
            bits = builder.bitcast(args[3], like(ir.IntType(32), lanes))
            upper = builder.lshr(bits, filled(ir.IntType(32), lanes, HALF_BITS))
            for part, place in zip((upper, bits), _places(builder, args, lanes), strict=True):
                builder.store(builder.trunc(part, like(ir.IntType(HALF_BITS), lanes)), place, align=2)
        return context.get_dummy_value()

    return codegen


def _lanes(element: Any) -> int:
    return Vector(element).lanes


@intrinsic
def _vector_of_halves(upper: Any, lower: Any, index: Any) -> Any:
    return Vector(upper.dtype)(upper, lower, types.intp), _join(_lanes)


@intrinsic
def _number_of_halves(upper: Any, lower: Any, index: Any) -> Any:
    return upper.dtype(upper, lower, types.intp), _join(lambda _: 1)


@intrinsic
def _put_vector(upper: Any, lower: Any, index: Any, value: Any) -> Any:
    return types.none(upper, lower, types.intp, Vector(upper.dtype)), _cut(_lanes)


@intrinsic
def _put_number(upper: Any, lower: Any, index: Any, value: Any) -> Any:
    return types.none(upper, lower, types.intp, upper.dtype), _cut(lambda _: 1)


@apart
def add_halves(upper: Any, lower: Any, index: int, width: int, lanes: int, factor: Any, target: Any) -> None:
    """Add `width` numbers from `index` on, times `factor`, to `target`, with the bits of products of plain numbers."""
    whole, share = width // lanes * lanes, zeros(target) + factor
    for c in range(0, whole, lanes):
        store(target, c, load(target, c) + product(_vector_of_halves(upper, lower, index + c), share))
    for c in range(max(whole, 0), width):
        target[c] += _number_of_halves(upper, lower, index + c) * factor


@apart
def keep_halves(upper: Any, lower: Any, index: int, width: int, lanes: int, source: Any) -> None:
    """Write `width` numbers of `source` to `index`."""
    whole = width // lanes * lanes
    for c in range(0, whole, lanes):
        _put_vector(upper, lower, index + c, load(source, c))
    for c in range(max(whole, 0), width):
        _put_number(upper, lower, index + c, source[c])
