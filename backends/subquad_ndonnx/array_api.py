"""The functions of the Python Array API standard on arrays of ndonnx, as far as subquad calls them.

Most are ndonnx's own; their results are `Graph` arrays, whose sizes can be computed with. What makes arrays, or takes a
shape, takes sizes that the graph leaves open.
"""

from __future__ import annotations

import builtins as _builtins
import math
from collections.abc import Sequence
from functools import wraps
from typing import Any, NamedTuple

import ndonnx as ndx
import numpy as np
import spox.opset.ai.onnx.v21 as op

from subquad_ndonnx.graph import broadcast, graph, scalar
from subquad_ndonnx.sizes import Size, as_vector

inf, nan = math.inf, math.nan
bool, float16, float32, float64 = ndx.bool, ndx.float16, ndx.float32, ndx.float64  # noqa: A001
int8, int16, int32, int64, uint8 = ndx.int8, ndx.int16, ndx.int32, ndx.int64, ndx.uint8
isdtype = ndx.isdtype


class Complex(NamedTuple):
    """A dtype that no array of ONNX's operators has; its name stands in comparisons."""

    name: str


complex64, complex128 = Complex("complex64"), Complex("complex128")


def _lifted(function: Any) -> Any:
    # a function of arrays that gives `Graph` arrays; it takes sizes for numbers
    @wraps(function)
    def run(*args: Any, device: Any = None, **options: Any) -> Any:
        return graph(function(*(scalar(x) for x in args), **options))

    return run


def _elementwise(function: Any) -> Any:
    # as `_lifted`, for functions that broadcast their arguments
    @wraps(function)
    def run(*args: Any, device: Any = None, **options: Any) -> Any:
        return graph(function(*(scalar(x) for x in args), **options), broadcast(*args))

    return run


def _reduction(function: Any) -> Any:
    # as `_lifted`, for functions that sum up axes
    @wraps(function)
    def run(x: Any, *, axis: Any = None, keepdims: Any = False, **options: Any) -> Any:
        gone = range(x.ndim) if axis is None else [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
        sizes = [1 if i in gone else size for i, size in enumerate(x.shape) if keepdims or i not in gone]
        return graph(function(x, axis=axis, keepdims=keepdims, **options), sizes)

    return run


abs, exp, expm1, log, log1p, sqrt, sin, cos, tanh = map(  # noqa: A001
    _elementwise, (ndx.abs, ndx.exp, ndx.expm1, ndx.log, ndx.log1p, ndx.sqrt, ndx.sin, ndx.cos, ndx.tanh)
)
isinf, isnan, logical_and, logical_or, logical_not = map(
    _elementwise, (ndx.isinf, ndx.isnan, ndx.logical_and, ndx.logical_or, ndx.logical_not)
)
all, any, prod, argmax, argmin = map(  # noqa: A001
    _reduction, (ndx.all, ndx.any, ndx.prod, ndx.argmax, ndx.argmin)
)
logaddexp = _elementwise(ndx.logaddexp)
astype, searchsorted = _elementwise(ndx.astype), _lifted(ndx.searchsorted)
repeat = _lifted(ndx.repeat)
take_along_axis = _lifted(ndx.take_along_axis)
cumulative_sum, argsort = map(_elementwise, (ndx.cumulative_sum, ndx.argsort))  # in the shape of their argument


def _one_node(node: Any, function: Any) -> Any:
    # the reduction of ndonnx, or for an axis with entries and a dtype that its node computes in, the node alone
    general = _reduction(function)

    @wraps(function)
    def run(x: Any, *, axis: Any = None, keepdims: Any = False, dtype: Any = None) -> Any:
        if dtype is not None or axis is None or x.dtype not in (float32, float64, int32, int64):
            return general(x, axis=axis, keepdims=keepdims, **({} if dtype is None else {"dtype": dtype}))
        axes = [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
        sizes = [1 if i in axes else size for i, size in enumerate(x.shape) if keepdims or i not in axes]
        return graph(node(x.unwrap_spox(), as_vector(tuple(axes)), keepdims=int(keepdims)), sizes)

    return run


sum, mean = _one_node(op.reduce_sum, ndx.sum), _one_node(op.reduce_mean, ndx.mean)  # noqa: A001
max, min = _one_node(op.reduce_max, ndx.max), _one_node(op.reduce_min, ndx.min)  # noqa: A001


def where(condition: Any, one: Any, other: Any) -> Any:
    """Entries of one array where the condition holds, of another elsewhere."""
    one, other = scalar(one), scalar(other)
    dtype = next(x.dtype for x in (one, other) if isinstance(x, ndx.Array))
    if isinstance(one, ndx.Array) and isinstance(other, ndx.Array):
        dtype = result_type(one, other)
    parts = [
        (x if x.dtype == dtype else ndx.astype(x, dtype)) if isinstance(x, ndx.Array) else asarray(x, dtype=dtype)
        for x in (one, other)
    ]
    variables = (x.unwrap_spox() for x in (condition, *parts))
    return graph(op.where(*variables), broadcast(condition, *parts))


def expand_dims(x: Any, *, axis: int = 0) -> Any:
    """The array with a new axis of length 1."""
    place = axis % (x.ndim + 1)
    sizes = [*x.shape[:place], 1, *x.shape[place:]]
    return graph(op.unsqueeze(x.unwrap_spox(), as_vector((place,))), sizes)


def finfo(dtype: Any) -> Any:
    """Numbers that describe a floating dtype."""
    return np.finfo(dtype.unwrap_numpy())


def result_type(*given: Any) -> Any:
    """The dtype that arrays and dtypes promote to."""
    found = [x.dtype if isinstance(x, ndx.Array) else x for x in given]
    return ndx.result_type(*found)


def asarray(x: Any, *, dtype: Any = None, device: Any = None, copy: Any = None) -> Any:
    """An array of numbers, of NumPy or of ndonnx."""
    return graph(ndx.asarray(scalar(x), dtype=dtype))


def full(shape: Any, value: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """An array of one number."""
    shape = shape if isinstance(shape, tuple | list) else (shape,)
    dtype = dtype or (float64 if isinstance(value, float) else int64)
    entry = ndx.asarray(np.asarray(value), dtype=dtype)
    if _builtins.all(isinstance(size, int) for size in shape):
        return graph(ndx.full(tuple(shape), value, dtype=dtype))
    return graph(op.expand(entry.unwrap_spox(), as_vector(tuple(shape))), shape)


def zeros(shape: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """An array of zeros."""
    return full(shape, 0.0, dtype=dtype or float64)


def ones(shape: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """An array of ones."""
    return full(shape, 1.0, dtype=dtype or float64)


empty = zeros


def zeros_like(x: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """Zeros in the shape of another array."""
    return full(x.shape, 0.0, dtype=dtype or x.dtype)


def ones_like(x: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """Ones in the shape of another array."""
    return full(x.shape, 1.0, dtype=dtype or x.dtype)


def full_like(x: Any, value: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """One number in the shape of another array."""
    return full(x.shape, value, dtype=dtype or x.dtype)


def eye(n: int, m: int | None = None, *, k: int = 0, dtype: Any = None, device: Any = None) -> Any:
    """Ones on a diagonal."""
    return graph(ndx.asarray(np.eye(n, m, k), dtype=dtype or float64))


def arange(start: Any, stop: Any = None, step: Any = 1, *, dtype: Any = None, device: Any = None) -> Any:
    """Evenly spaced numbers."""
    start, stop = (0, start) if stop is None else (start, stop)
    if not isinstance(start, Size) and not isinstance(stop, Size):
        return graph(ndx.asarray(np.arange(start, stop, step), dtype=dtype or int64))
    limits = (x if isinstance(x, ndx.Array) else ndx.asarray(np.int64(x)) for x in (scalar(start), scalar(stop)))
    first, last = (x.unwrap_spox() for x in limits)
    found = op.range(first, last, op.const(np.int64(step)))
    size = stop - start if step == 1 else None
    return astype(graph(found, (size,)), dtype or int64)


def reshape(x: Any, shape: Sequence[Any], *, copy: Any = None) -> Any:
    """The entries in another shape, of which one size may be −1."""
    if -1 in [size for size in shape if isinstance(size, int)]:
        others = math.prod(size for size in shape if not (isinstance(size, int) and size == -1))
        left = math.prod(x.shape) // others if others != 0 else 0
        sizes = [left if isinstance(size, int) and size == -1 else size for size in shape]
    else:
        sizes = list(shape)
    return graph(op.reshape(x.unwrap_spox(), as_vector(tuple(shape)), allowzero=True), sizes)


def broadcast_to(x: Any, shape: Sequence[Any]) -> Any:
    """The array repeated along axes of length 1 to another shape."""
    if tuple(map(str, x.shape)) == tuple(map(str, shape)):
        return graph(x)
    return graph(op.expand(x.unwrap_spox(), as_vector(tuple(shape))), shape)


def concat(arrays: Sequence[Any], *, axis: int = 0) -> Any:
    """Arrays one after the other."""
    arrays = [x for x in arrays if not (isinstance(x.shape[axis], int) and x.shape[axis] == 0)] or arrays[:1]
    dtype = result_type(*arrays)
    arrays = [x if x.dtype == dtype else ndx.astype(x, dtype) for x in arrays]
    sizes = list(arrays[0].shape)
    sizes[axis] = _builtins.sum(x.shape[axis] for x in arrays)
    return graph(op.concat([x.unwrap_spox() for x in arrays], axis=axis), sizes)


def stack(arrays: Sequence[Any], *, axis: int = 0) -> Any:
    """Arrays along a new axis."""
    return concat([expand_dims(x, axis=axis) for x in arrays], axis=axis)


def permute_dims(x: Any, axes: Sequence[int]) -> Any:
    """The axes in another order."""
    return graph(op.transpose(x.unwrap_spox(), perm=list(axes)), [x.shape[axis] for axis in axes])


def matrix_transpose(x: Any) -> Any:
    """The last two axes exchanged."""
    *batch, one, other = range(x.ndim)
    return permute_dims(x, (*batch, other, one))


def moveaxis(x: Any, source: int, destination: int) -> Any:
    """One axis moved to another place."""
    axes = [axis for axis in range(x.ndim) if axis != source % x.ndim]
    axes.insert(destination % x.ndim, source % x.ndim)
    return permute_dims(x, axes)


def take(x: Any, indices: Any, *, axis: int | None = None) -> Any:
    """The entries with these numbers along an axis, which an array of one axis need not name."""
    place = 0 if axis is None else axis % x.ndim
    indices = graph(indices)
    sizes = [*x.shape[:place], *indices.shape, *x.shape[place + 1 :]]
    return graph(op.gather(x.unwrap_spox(), indices.unwrap_spox(), axis=place), sizes)


def flip(x: Any, *, axis: int | None = None) -> Any:
    """The entries in reverse order along an axis."""
    axis = 0 if axis is None else axis
    back = op.const(np.asarray([-1], dtype=np.int64))
    ends = (op.const(np.asarray([end], dtype=np.int64)) for end in (2**62, -(2**62)))
    axes = op.const(np.asarray([axis % x.ndim], dtype=np.int64))
    return graph(op.slice(x.unwrap_spox(), *ends, axes=axes, steps=back), x.shape)


def isfinite(x: Any) -> Any:
    """Whether entries are numbers: x − x is NaN where they are not."""
    return (x - x) == 0


def maximum(a: Any, b: Any) -> Any:
    """The larger of two entries; NaN where one is."""
    return _larger(ndx.maximum, op.max, a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two entries; NaN where one is."""
    return _larger(ndx.minimum, op.min, a, b)


def _larger(function: Any, node: Any, a: Any, b: Any) -> Any:
    arrays = isinstance(a, ndx.Array) and isinstance(b, ndx.Array)
    if arrays and a.dtype == b.dtype and a.dtype in (float32, float64, int32, int64):
        return graph(node([a.unwrap_spox(), b.unwrap_spox()]))
    return graph(function(scalar(a), scalar(b)))


def clip(x: Any, min: Any = None, max: Any = None) -> Any:  # noqa: A002  names of the standard
    """The entries within bounds."""
    return graph(ndx.clip(x, scalar(min), scalar(max)))


def broadcast_arrays(*arrays: Any) -> list[Any]:
    """Arrays broadcast against each other."""
    shape = np.broadcast_shapes(*(tuple(x.shape) for x in arrays))
    return [broadcast_to(x, shape) for x in arrays]


def real(x: Any) -> Any:
    """The array itself: ONNX has real numbers."""
    return x


conj = real


def imag(x: Any) -> Any:
    """Zeros: ONNX has real numbers."""
    return zeros_like(x)
