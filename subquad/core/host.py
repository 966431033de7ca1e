"""The values of arrays of any library, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from subquad.backend import Array


def to_host(x: Array, dtype: Any = np.int64) -> Any:
    """The numbers of an array as a NumPy array, of this dtype unless they are in NumPy already."""
    if isinstance(x, np.ndarray):
        return x
    return np.asarray(x.tolist() if hasattr(x, "tolist") else np.from_dlpack(x), dtype=dtype).reshape(x.shape)


def floats_of(x: Array) -> Any:
    """The numbers of a floating array as a NumPy array, in the memory of `x` where that is the host's."""
    if isinstance(x, np.ndarray):
        return x
    try:
        return np.from_dlpack(x)
    except (BufferError, TypeError, ValueError, RuntimeError, AttributeError):  # another device, or no such protocol
        return to_host(x, np.float64)
