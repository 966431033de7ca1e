"""NumPy as a namespace of the array API standard: NumPy's own functions, and the few of array_api_compat that differ.

A module of its own, since ``import array_api_compat.numpy`` reads every public module of NumPy, f2py and the test
tools too: a tenth of a second, a quarter of what a first call imports.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from subquad_numpy.half.calls import LEAST, converted

OTHER = frozenset({
    "ceil", "count_nonzero", "cumulative_prod", "fft", "floor", "nonzero", "sign", "sort", "std", "tensordot", "trunc",
    "unique_all", "unique_counts", "unique_inverse", "unique_values", "var",
})  # fmt: skip
"""Names that NumPy lacks, or for which it takes other arguments or returns another dtype or class."""


def __getattr__(name: str) -> Any:
    if name in OTHER:
        import array_api_compat.numpy as source
    else:
        source = np
    found = getattr(source, name)
    globals()[name] = found
    return found


def argsort(
    x: np.ndarray[Any, Any], /, *, axis: int = -1, descending: bool = False, stable: bool = True
) -> np.ndarray[Any, Any]:
    """The order of the numbers along an axis; equal numbers keep theirs, in either direction."""
    if not descending:
        return np.argsort(x, axis=axis, stable=stable)
    turned = np.argsort(np.flip(x, axis=axis), axis=axis, stable=stable)
    return np.flip(x.shape[axis] - 1 - turned, axis=axis)


def asarray(x: Any, /, *, dtype: Any = None, device: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
    """`numpy.asarray`, by position and keyword as the standard says."""
    return np.asarray(x, dtype=dtype, device=device, copy=copy)


def astype(x: np.ndarray[Any, Any], dtype: Any, /, *, copy: bool = True, device: Any = None) -> np.ndarray[Any, Any]:
    """`numpy.ndarray.astype`; the device is the processor."""
    if device not in (None, "cpu"):
        msg = f"device must be 'cpu' or None for NumPy, got {device!r}"
        raise ValueError(msg)
    return converted(x, dtype) if x.size >= LEAST and x.dtype != dtype else x.astype(dtype, copy=copy)


def clip(x: np.ndarray[Any, Any], /, min: Any = None, max: Any = None) -> np.ndarray[Any, Any]:  # noqa: A002  names of the standard
    """`numpy.clip` by numbers, which do not change the dtype."""
    return np.clip(x, min, max)


def take_along_axis(x: np.ndarray[Any, Any], indices: Any, /, *, axis: int = -1) -> np.ndarray[Any, Any]:
    """`numpy.take_along_axis`, along the last axis unless another is given."""
    return np.take_along_axis(x, indices, axis=axis)
