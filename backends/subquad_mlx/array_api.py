"""The functions of the Python Array API standard on MLX arrays, as far as subquad calls them.

Most are MLX's own. The rest differ in names or keywords, and none takes a device but None: in MLX it is operations that
have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import mlx.core as mx
from mlx.core import (
    abs,  # noqa: A004
    all,  # noqa: A004
    any,  # noqa: A004
    astype,
    bool_,
    broadcast_arrays,
    broadcast_to,
    complex64,
    concat,
    conj,
    cos,
    exp,
    expand_dims,
    expm1,
    flip,
    float16,
    float32,
    float64,
    imag,
    inf,
    int8,
    int16,
    int32,
    int64,
    isdtype,
    isfinite,
    isinf,
    isnan,
    log,
    log1p,
    logaddexp,
    logical_and,
    logical_not,
    logical_or,
    matmul,
    matrix_transpose,
    max,  # noqa: A004
    maximum,
    mean,
    min,  # noqa: A004
    minimum,
    moveaxis,
    nan,
    permute_dims,
    prod,
    real,
    repeat,
    reshape,
    result_type,
    searchsorted,
    sin,
    sqrt,
    stack,
    tanh,
    uint8,
    where,
)

from subquad.core.dtypes import FloatInfo
from subquad_mlx import linalg

bool = bool_  # noqa: A001
cpu = mx.Device(mx.cpu)


SMALLEST = {float16: 2.0**-14, mx.bfloat16: 2.0**-126, float32: 2.0**-126, complex64: 2.0**-126, float64: 2.0**-1022}


def finfo(dtype: mx.Dtype) -> FloatInfo:
    """Numbers that describe a floating dtype."""
    own = mx.finfo(dtype)
    bits = 8 * dtype.size // (2 if dtype == complex64 else 1)
    return FloatInfo(bits, float(own.eps), float(own.max), float(own.min), SMALLEST[dtype])


def _made(function: Any) -> Any:
    # a function that makes an array, with a keyword `device` that must be None
    @wraps(function)
    def make(*args: Any, device: None = None, **options: Any) -> mx.array:
        if device is not None:
            msg = f"device is {device!r}, expected None: MLX arrays have no device, operations have"
            raise ValueError(msg)
        return function(*args, **{name: x for name, x in options.items() if x is not None})

    return make


zeros, ones, full, eye = map(_made, (mx.zeros, mx.ones, mx.full, mx.eye))
zeros_like, ones_like, full_like = map(_made, (mx.zeros_like, mx.ones_like, mx.full_like))
empty = zeros


@_made
def arange(start: float, stop: float | None = None, step: float = 1, *, dtype: mx.Dtype | None = None) -> mx.array:
    """Evenly spaced numbers."""
    start, stop = (0, start) if stop is None else (start, stop)
    return mx.arange(start, stop, step, dtype=dtype)


@_made
def asarray(x: Any, *, dtype: mx.Dtype | None = None, copy: Any = None) -> mx.array:
    """An array of numbers, of nested lists, or of an array of any library on the CPU."""
    if isinstance(x, mx.array):
        return x if dtype is None or x.dtype == dtype else x.astype(dtype)
    return mx.array(x, dtype=dtype)


def argsort(x: mx.array, *, axis: int = -1, descending: Any = False, stable: Any = True) -> mx.array:
    """The numbers of the entries in sorted order, int32; MLX sorts stably."""
    if descending:
        x = mx.where(x, 0, 1) if x.dtype == bool_ else -x
    return mx.argsort(x, axis=axis).astype(int32)


def argmax(x: mx.array, *, axis: int | None = None, keepdims: Any = False) -> mx.array:
    """The number of the largest entry, int32."""
    return _number(mx.argmax, x, axis, keepdims)


def argmin(x: mx.array, *, axis: int | None = None, keepdims: Any = False) -> mx.array:
    """The number of the smallest entry, int32."""
    return _number(mx.argmin, x, axis, keepdims)


def _number(find: Any, x: mx.array, axis: int | None, keepdims: Any) -> mx.array:
    if axis is not None and x.size == 0 and x.shape[axis] > 0:  # an empty result, which MLX refuses to make
        return mx.sum(x, axis=axis, keepdims=keepdims).astype(int32)
    return find(x, axis=axis, keepdims=keepdims).astype(int32)


def clip(x: mx.array, min: Any = None, max: Any = None) -> mx.array:  # noqa: A002, F811  names of the standard
    """The entries within bounds."""
    return mx.clip(x, min, max)


def cumulative_sum(x: mx.array, *, axis: int, dtype: mx.Dtype | None = None) -> mx.array:
    """Sums of the first entries along an axis."""
    return mx.cumsum(x if dtype is None else x.astype(dtype), axis=axis)


def sum(  # noqa: A001
    x: mx.array, *, axis: int | Sequence[int] | None = None, dtype: mx.Dtype | None = None, keepdims: Any = False
) -> mx.array:
    """The sum along axes."""
    return mx.sum(x if dtype is None else x.astype(dtype), axis=axis, keepdims=keepdims)


def take(x: mx.array, indices: mx.array, *, axis: int | None = None) -> mx.array:
    """The entries with these numbers along an axis, which an array of one axis need not name."""
    return mx.take(x, mx.stop_gradient(indices), axis=axis)


def take_along_axis(x: mx.array, indices: mx.array, *, axis: int = -1) -> mx.array:
    """The entries with these numbers along an axis, line by line."""
    return mx.take_along_axis(x, mx.stop_gradient(indices), axis=axis)
