"""The functions of the Python Array API standard on tensors of TensorFlow, as far as subquad calls them.

Most are TensorFlow's own by another name or with other keywords. A device is a name, and None is the place that
TensorFlow chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce, wraps
from typing import Any

import numpy as np
import tensorflow as tf
from ml_dtypes import finfo as numpy_finfo
from tensorflow import (
    abs,  # noqa: A004
    bfloat16,
    broadcast_to,
    complex64,
    complex128,
    cos,
    exp,
    float16,
    float32,
    float64,
    int8,
    int16,
    int32,
    int64,
    logical_and,
    logical_not,
    logical_or,
    matmul,
    maximum,
    minimum,
    ones_like,
    reshape,
    sin,
    sqrt,
    stack,
    tanh,
    uint8,
    uint16,
    uint32,
    uint64,
    zeros_like,
)
from tensorflow.linalg import matrix_transpose
from tensorflow.math import conj, expm1, imag, is_finite, is_inf, is_nan, log, log1p, real

from subquad.core.dtypes import FloatInfo
from subquad_tensorflow import linalg

bool = tf.bool  # noqa: A001
isinf, isnan = is_inf, is_nan
inf, nan = math.inf, math.nan

KINDS = {
    "bool": (bool,),
    "signed integer": (int8, int16, int32, int64),
    "unsigned integer": (uint8, uint16, uint32, uint64),
    "real floating": (bfloat16, float16, float32, float64),
    "complex floating": (complex64, complex128),
}
KINDS["integral"] = KINDS["signed integer"] + KINDS["unsigned integer"]
KINDS["numeric"] = KINDS["integral"] + KINDS["real floating"] + KINDS["complex floating"]


def isfinite(x: tf.Tensor) -> tf.Tensor:
    """Of complex numbers, both parts: TensorFlow has it for real ones."""
    return is_finite(real(x)) & is_finite(imag(x)) if x.dtype.is_complex else is_finite(x)


def finfo(dtype: tf.DType) -> FloatInfo:
    """Numbers that describe a floating dtype."""
    own = numpy_finfo(dtype.real_dtype.as_numpy_dtype)
    return FloatInfo(own.bits, float(own.eps), float(own.max), float(own.min), float(own.smallest_normal))


def isdtype(dtype: tf.DType, kind: str | tf.DType | tuple[str | tf.DType, ...]) -> Any:
    """Whether a dtype is of one of the kinds."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return dtype in [one for kind in kinds for one in KINDS.get(kind, (kind,))]


def result_type(*given: Any) -> tf.DType:
    """The dtype that dtypes, or those of arrays, promote to, by NumPy's rules; bfloat16 and float16 give float32."""
    dtypes = [tf.as_dtype(getattr(x, "dtype", x)) for x in given]
    if dtypes[1:] == dtypes[:-1]:
        return dtypes[0]
    return tf.as_dtype(np.result_type(*((float32 if x == bfloat16 else x).as_numpy_dtype for x in dtypes)))


def astype(x: tf.Tensor, dtype: tf.DType, /, *, copy: Any = True) -> tf.Tensor:
    """The entries as numbers of another dtype."""
    return tf.cast(x, dtype)


def _made(function: Any) -> Any:
    # a function that makes an array, on a device that has a name
    @wraps(function)
    def make(*args: Any, device: str | None = None, **options: Any) -> tf.Tensor:
        if device is None:
            return function(*args, **options)
        with tf.device(device):
            return function(*args, **options)

    return make


def _shape(shape: int | Sequence[Any]) -> Sequence[Any]:
    return (shape,) if isinstance(shape, int) else shape


@_made
def zeros(shape: Any, *, dtype: tf.DType | None = None) -> tf.Tensor:
    """An array of zeros."""
    return tf.zeros(_shape(shape), dtype or float32)


@_made
def ones(shape: Any, *, dtype: tf.DType | None = None) -> tf.Tensor:
    """An array of ones."""
    return tf.ones(_shape(shape), dtype or float32)


@_made
def full(shape: Any, fill_value: Any, *, dtype: tf.DType | None = None) -> tf.Tensor:
    """An array of one number."""
    return tf.fill(_shape(shape), tf.convert_to_tensor(fill_value, dtype))


@_made
def eye(rows: int, columns: int | None = None, *, dtype: tf.DType | None = None) -> tf.Tensor:
    """A matrix with ones on its diagonal."""
    return tf.eye(rows, columns, dtype=dtype or float32)


@_made
def arange(start: Any, stop: Any = None, step: Any = 1, *, dtype: tf.DType | None = None) -> tf.Tensor:
    """Evenly spaced numbers."""
    start, stop = (0, start) if stop is None else (start, stop)
    return tf.range(start, stop, step, dtype=dtype)


@_made
def asarray(x: Any, *, dtype: tf.DType | None = None, copy: Any = None) -> tf.Tensor:
    """An array of numbers, of nested lists, or of an array of NumPy."""
    if tf.is_tensor(x):
        return tf.convert_to_tensor(x) if dtype is None or x.dtype == dtype else tf.cast(x, dtype)
    return tf.convert_to_tensor(x, dtype)


@_made
def full_like(x: tf.Tensor, fill_value: Any, *, dtype: tf.DType | None = None) -> tf.Tensor:
    """An array of one number, of the shape of another."""
    return tf.fill(tf.shape(x), tf.convert_to_tensor(fill_value, dtype or x.dtype))


empty = zeros
zeros_like, ones_like = map(_made, (zeros_like, ones_like))


def _alike(*given: Any) -> list[tf.Tensor]:
    # arrays in their common dtype; numbers of Python have none of their own
    arrays = [x for x in given if tf.is_tensor(x)]
    dtype = result_type(*arrays) if arrays else None
    return [
        tf.convert_to_tensor(x, dtype) if not tf.is_tensor(x) else x if x.dtype == dtype else tf.cast(x, dtype)
        for x in given
    ]


def where(condition: tf.Tensor, x: Any, y: Any) -> tf.Tensor:
    """The entries of x where the condition is true, else those of y."""
    return tf.where(condition, *_alike(x, y))


def concat(arrays: Sequence[tf.Tensor], *, axis: int | None = 0) -> tf.Tensor:
    """Arrays one after the other along an axis."""
    arrays = _alike(*arrays)
    return tf.concat([reshape(x, (-1,)) for x in arrays] if axis is None else arrays, 0 if axis is None else axis)


def broadcast_arrays(*arrays: tf.Tensor) -> list[tf.Tensor]:
    """The arrays in their common shape."""
    shape = reduce(tf.broadcast_dynamic_shape, (tf.shape(x) for x in arrays))
    return [tf.broadcast_to(x, shape) for x in arrays]


def expand_dims(x: tf.Tensor, *, axis: int = 0) -> tf.Tensor:
    """The array with a new axis of size 1."""
    return tf.expand_dims(x, axis)


def flip(x: tf.Tensor, *, axis: int | Sequence[int] | None = None) -> tf.Tensor:
    """The array with the order of entries along axes reversed."""
    axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    return tf.reverse(x, [a % x.ndim for a in axes])


def permute_dims(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """The array with its axes in another order."""
    return tf.transpose(x, axes)


def moveaxis(x: tf.Tensor, source: int, destination: int) -> tf.Tensor:
    """The array with one axis at another place."""
    order = [axis for axis in range(x.ndim) if axis != source % x.ndim]
    order.insert(destination % x.ndim, source % x.ndim)
    return tf.transpose(x, order)


def repeat(x: tf.Tensor, repeats: Any, *, axis: int | None = None) -> tf.Tensor:
    """The array with each entry repeated along an axis."""
    return tf.repeat(x, repeats, axis=axis)


def take(x: tf.Tensor, indices: tf.Tensor, *, axis: int | None = None) -> tf.Tensor:
    """The entries with these numbers along an axis, which an array of one axis need not name."""
    return tf.gather(x, indices, axis=0 if axis is None else axis)


def take_along_axis(x: tf.Tensor, indices: tf.Tensor, *, axis: int = -1) -> tf.Tensor:
    """The entries with these numbers along an axis, line by line."""
    return tf.experimental.numpy.take_along_axis(x, indices, axis)


def searchsorted(x: tf.Tensor, values: tf.Tensor, *, side: str = "left") -> tf.Tensor:
    """Where values go in an array of one axis that is sorted."""
    flat = tf.searchsorted(x, reshape(values, (-1,)), side=side)
    return reshape(flat, tf.shape(values))


def argsort(x: tf.Tensor, *, axis: int = -1, descending: Any = False, stable: Any = True) -> tf.Tensor:
    """The numbers of the entries in sorted order, int32; NaN counts as the largest, as in NumPy."""
    x = tf.cast(x, int32) if x.dtype == bool else where(is_nan(x), inf, x) if x.dtype.is_floating else x
    return tf.argsort(x, axis=axis, direction="DESCENDING" if descending else "ASCENDING", stable=True)


def _arg(function: Any, x: tf.Tensor, axis: int | None, keepdims: Any) -> tf.Tensor:
    found = function(reshape(x, (-1,)) if axis is None else x, axis=0 if axis is None else axis, output_type=int32)
    if not keepdims:
        return found
    return reshape(found, (1,) * x.ndim) if axis is None else tf.expand_dims(found, axis)


def argmax(x: tf.Tensor, *, axis: int | None = None, keepdims: Any = False) -> tf.Tensor:
    """The number of the largest entry, int32."""
    return _arg(tf.argmax, x, axis, keepdims)


def argmin(x: tf.Tensor, *, axis: int | None = None, keepdims: Any = False) -> tf.Tensor:
    """The number of the smallest entry, int32."""
    return _arg(tf.argmin, x, axis, keepdims)


def cumulative_sum(x: tf.Tensor, *, axis: int = -1, dtype: tf.DType | None = None) -> tf.Tensor:
    """Sums of the first entries along an axis."""
    return tf.cumsum(x if dtype is None else tf.cast(x, dtype), axis)


def sum(x: tf.Tensor, *, axis: Any = None, dtype: tf.DType | None = None, keepdims: Any = False) -> tf.Tensor:  # noqa: A001
    """The sum along axes; of small integers and bool in int64."""
    if dtype is None and (x.dtype == bool or x.dtype.is_integer):
        dtype = int64
    return tf.reduce_sum(x if dtype is None else tf.cast(x, dtype), axis, keepdims)


def prod(x: tf.Tensor, *, axis: Any = None, dtype: tf.DType | None = None, keepdims: Any = False) -> tf.Tensor:
    """The product along axes."""
    return tf.reduce_prod(x if dtype is None else tf.cast(x, dtype), axis, keepdims)


def _reduced(function: Any) -> Any:
    def reduced(x: tf.Tensor, *, axis: Any = None, keepdims: Any = False) -> tf.Tensor:
        return function(x, axis, keepdims)

    return reduced


all, any, max, min, mean = map(_reduced, (tf.reduce_all, tf.reduce_any, tf.reduce_max, tf.reduce_min, tf.reduce_mean))  # noqa: A001


def clip(x: tf.Tensor, min: Any = None, max: Any = None) -> tf.Tensor:  # noqa: A002  names of the standard
    """The entries within bounds."""
    x = x if min is None else tf.maximum(*_alike(x, min))
    return x if max is None else tf.minimum(*_alike(x, max))


def logaddexp(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """log(exp(x) + exp(y)), without overflow."""
    return tf.experimental.numpy.logaddexp(x, y)
