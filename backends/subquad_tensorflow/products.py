"""Products of matrices whose batches differ, as subquad computes them.

TensorFlow 2.21 with oneDNN, its default on x86, is not right in some products of float32 whose batches broadcast.
Within calls of subquad, the operator @ therefore makes batches equal first; elsewhere it is TensorFlow's own.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import Any

import tensorflow as tf

_depth: ContextVar[int] = ContextVar("depth", default=0)
_own = tf.Tensor.__matmul__


class Computing:
    """The context of a call of subquad."""

    def __enter__(self) -> None:
        _depth.set(_depth.get() + 1)

    def __exit__(self, *error: object) -> None:
        _depth.set(_depth.get() - 1)


def product(x: tf.Tensor, y: Any) -> Any:
    """The matrix product x y, of batches that broadcast."""
    if not _depth.get() or not isinstance(y, tf.Tensor) or x.shape[:-2] == y.shape[:-2]:
        return _own(x, y)
    if y.ndim == 2:
        rows = tf.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
        return tf.reshape(_own(rows, y), (*x.shape[:-1], y.shape[-1]))
    batch = tf.broadcast_static_shape(x.shape[:-2], y.shape[:-2])
    return _own(*(tf.broadcast_to(z, (*batch, *z.shape[-2:])) for z in (x, y)))


tf.Tensor.__matmul__ = product
