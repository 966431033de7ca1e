"""The linear algebra of the Array API standard on tensors of TensorFlow."""

from __future__ import annotations

import tensorflow as tf
from ml_dtypes import finfo
from tensorflow.linalg import eigh, inv, solve

__all__ = ["eigh", "inv", "pinv", "solve"]


def pinv(x: tf.Tensor, *, rtol: float | None = None) -> tf.Tensor:
    """Pseudo-inverses of matrices, by the singular values above rtol times the largest one."""
    rtol = max(x.shape[-2:]) * finfo(x.dtype.as_numpy_dtype).eps if rtol is None else rtol
    return tf.linalg.pinv(x, rcond=rtol)
