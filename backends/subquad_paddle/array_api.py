"""The functions of the Python Array API standard on tensors of Paddle, as far as subquad calls them.

Most are Paddle's own by another name or with other keywords.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import wraps
from typing import Any

import numpy as np
import paddle
from paddle import (
    abs,  # noqa: A004
    bfloat16,
    bool,  # noqa: A004
    broadcast_to,
    complex64,
    complex128,
    conj,
    cos,
    exp,
    expm1,
    finfo,
    float16,
    float32,
    float64,
    imag,
    int8,
    int16,
    int32,
    int64,
    isfinite,
    isinf,
    isnan,
    log,
    log1p,
    logical_and,
    logical_not,
    logical_or,
    matmul,
    moveaxis,
    real,
    reshape,
    sin,
    sqrt,
    tanh,
    uint8,
)

from subquad_paddle import linalg

TENSORS = (paddle.Tensor, paddle.pir.Value)  # computed at once; of a program that is being built
inf, nan = math.inf, math.nan

KINDS = {
    "bool": (bool,),
    "signed integer": (int8, int16, int32, int64),
    "unsigned integer": (uint8,),
    "real floating": (bfloat16, float16, float32, float64),
    "complex floating": (complex64, complex128),
}
KINDS["integral"] = KINDS["signed integer"] + KINDS["unsigned integer"]
KINDS["numeric"] = KINDS["integral"] + KINDS["real floating"] + KINDS["complex floating"]


def isdtype(dtype: Any, kind: Any) -> Any:
    """Whether a dtype is of one of the kinds."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return dtype in [one for kind in kinds for one in KINDS.get(kind, (kind,))]


def result_type(*given: Any) -> Any:
    """The dtype that dtypes, or those of arrays, promote to, by NumPy's rules; bfloat16 and float16 give float32."""
    dtypes = [getattr(x, "dtype", x) for x in given]
    if dtypes[1:] == dtypes[:-1]:
        return dtypes[0]
    names = (str(float32 if x == bfloat16 else x).rpartition(".")[2] for x in dtypes)
    return getattr(paddle, np.result_type(*names).name)


def astype(x: Any, dtype: Any, /, *, copy: Any = True) -> Any:
    """The entries as numbers of another dtype."""
    return x.astype(dtype)


def _made(function: Any) -> Any:
    # a function that makes an array, on the device of a place
    @wraps(function)
    def make(*args: Any, device: Any = None, **options: Any) -> Any:
        made = function(*args, **options)
        return made if device is None or made.place == device else made.to(device)

    return make


def _shape(shape: Any) -> list[int]:
    return [shape] if isinstance(shape, int) else list(shape)


@_made
def zeros(shape: Any, *, dtype: Any = None) -> Any:
    """An array of zeros."""
    return paddle.zeros(_shape(shape), dtype or float32)


@_made
def ones(shape: Any, *, dtype: Any = None) -> Any:
    """An array of ones."""
    return paddle.ones(_shape(shape), dtype or float32)


@_made
def full(shape: Any, fill_value: Any, *, dtype: Any = None) -> Any:
    """An array of one number."""
    return paddle.full(_shape(shape), fill_value, dtype)


@_made
def eye(rows: int, columns: int | None = None, *, dtype: Any = None) -> Any:
    """A matrix with ones on its diagonal."""
    return paddle.eye(rows, columns, dtype=dtype or float32)


@_made
def arange(start: Any, stop: Any = None, step: Any = 1, *, dtype: Any = None) -> Any:
    """Evenly spaced numbers."""
    start, stop = (0, start) if stop is None else (start, stop)
    return paddle.arange(start, stop, step, dtype=dtype)


@_made
def asarray(x: Any, *, dtype: Any = None, copy: Any = None) -> Any:
    """An array of numbers, of nested lists, or of an array of NumPy."""
    if isinstance(x, TENSORS):
        return x if dtype is None or x.dtype == dtype else x.astype(dtype)
    return paddle.to_tensor(x, dtype=dtype)


@_made
def zeros_like(x: Any, *, dtype: Any = None) -> Any:
    """An array of zeros, of the shape of another."""
    return paddle.zeros_like(x, dtype)


@_made
def ones_like(x: Any, *, dtype: Any = None) -> Any:
    """An array of ones, of the shape of another."""
    return paddle.ones_like(x, dtype)


@_made
def full_like(x: Any, fill_value: Any, *, dtype: Any = None) -> Any:
    """An array of one number, of the shape of another."""
    return paddle.full_like(x, fill_value, dtype)


empty = zeros


def _alike(*given: Any) -> list[Any]:
    # arrays in their common dtype; numbers of Python have none of their own
    dtype = result_type(*(x for x in given if isinstance(x, TENSORS)))
    return [
        paddle.full([], x, dtype) if not isinstance(x, TENSORS) else x if x.dtype == dtype else x.astype(dtype)
        for x in given
    ]


def _wide(function: Any) -> Any:
    # a function that has no form for half precision on CPUs, which float32 serves exactly
    @wraps(function)
    def computed(*arrays: Any, **options: Any) -> Any:
        dtype = arrays[-1].dtype
        if dtype not in (bfloat16, float16):
            return function(*arrays, **options)
        return function(*(x if x.dtype == bool else x.astype(float32) for x in arrays), **options).astype(dtype)

    return computed


def where(condition: Any, x: Any, y: Any) -> Any:
    """The entries of x where the condition is true, else those of y."""
    return _wide(paddle.where)(condition, *_alike(x, y))


def maximum(x: Any, y: Any) -> Any:
    """The larger entries."""
    return _wide(paddle.maximum)(*_alike(x, y))


def minimum(x: Any, y: Any) -> Any:
    """The smaller entries."""
    return _wide(paddle.minimum)(*_alike(x, y))


def clip(x: Any, min: Any = None, max: Any = None) -> Any:  # noqa: A002  names of the standard
    """The entries within bounds."""
    x = x if min is None else maximum(x, min)
    return x if max is None else minimum(x, max)


def logaddexp(x: Any, y: Any) -> Any:
    """log(exp(x) + exp(y)), without overflow; Paddle's own is NaN where both are infinite."""
    largest, least = maximum(x, y), minimum(x, y)
    return largest + log1p(exp(where(largest == least, 0.0, least - largest)))


def _listed(function: Any) -> Any:
    def joined(arrays: Sequence[Any], *, axis: int = 0) -> Any:
        return function(_alike(*arrays), axis)

    return joined


concat, stack = map(_listed, (paddle.concat, paddle.stack))


def broadcast_arrays(*arrays: Any) -> list[Any]:
    """The arrays in their common shape."""
    return paddle.broadcast_tensors(list(arrays))


def expand_dims(x: Any, *, axis: int = 0) -> Any:
    """The array with a new axis of size 1."""
    return paddle.unsqueeze(x, axis)


def flip(x: Any, *, axis: Any = None) -> Any:
    """The array with the order of entries along axes reversed."""
    return paddle.flip(x, list(range(x.ndim)) if axis is None else axis)


def permute_dims(x: Any, axes: Sequence[int]) -> Any:
    """The array with its axes in another order."""
    return paddle.transpose(x, [axis % x.ndim for axis in axes])


def matrix_transpose(x: Any) -> Any:
    """The array with its last two axes exchanged."""
    return paddle.swapaxes(x, -1, -2)


def repeat(x: Any, repeats: Any, *, axis: int | None = None) -> Any:
    """The array with each entry repeated along an axis."""
    return paddle.repeat_interleave(x, repeats, axis=axis)


def take(x: Any, indices: Any, *, axis: int | None = None) -> Any:
    """The entries with these numbers along an axis, which an array of one axis need not name."""
    return paddle.index_select(x, indices, axis=0 if axis is None else axis)


def take_along_axis(x: Any, indices: Any, *, axis: int = -1) -> Any:
    """The entries with these numbers along an axis, line by line."""
    if x.dtype == bool:
        return paddle.take_along_axis(x.astype(uint8), indices, axis).astype(bool)
    return paddle.take_along_axis(x, indices, axis)


def searchsorted(x: Any, values: Any, *, side: str = "left") -> Any:
    """Where values go in an array of one axis that is sorted."""
    return paddle.searchsorted(x, values, right=side == "right")


def argsort(x: Any, *, axis: int = -1, descending: Any = False, stable: Any = True) -> Any:
    """The numbers of the entries in sorted order, int32."""
    x = x.astype(int32) if x.dtype in (bool, int8) else x
    return paddle.argsort(x, axis=axis, descending=descending, stable=True).astype(int32)


def argmax(x: Any, *, axis: int | None = None, keepdims: Any = False) -> Any:
    """The number of the largest entry, int32."""
    return paddle.argmax(x, axis=axis, keepdim=keepdims, dtype="int32")


def argmin(x: Any, *, axis: int | None = None, keepdims: Any = False) -> Any:
    """The number of the smallest entry, int32."""
    return paddle.argmin(x, axis=axis, keepdim=keepdims, dtype="int32")


def cumulative_sum(x: Any, *, axis: int = -1, dtype: Any = None) -> Any:
    """Sums of the first entries along an axis."""
    return paddle.cumsum(x if dtype is None else x.astype(dtype), axis=axis)


def sum(x: Any, *, axis: Any = None, dtype: Any = None, keepdims: Any = False) -> Any:  # noqa: A001
    """The sum along axes."""
    total = paddle.sum(x if dtype is None else x.astype(dtype), axis=axis, keepdim=keepdims)
    return total if dtype is None or total.dtype == dtype else total.astype(dtype)  # Paddle adds integers up in int64


def prod(x: Any, *, axis: Any = None, dtype: Any = None, keepdims: Any = False) -> Any:
    """The product along axes."""
    return paddle.prod(x if dtype is None else x.astype(dtype), axis=axis, keepdim=keepdims)


def _reduced(function: Any) -> Any:
    def reduced(x: Any, *, axis: Any = None, keepdims: Any = False) -> Any:
        return function(x, axis=axis, keepdim=keepdims)

    return reduced


mean, all, any = map(_reduced, (paddle.mean, paddle.all, paddle.any))  # noqa: A001
max, min = map(_wide, map(_reduced, (paddle.max, paddle.min)))  # noqa: A001
