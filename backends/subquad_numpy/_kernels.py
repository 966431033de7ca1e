"""The compiled scans as overrides of the kernels; Numba is imported at the first call."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LINEAR_DTYPES = ("float32", "float64", "complex64", "complex128")  # long doubles have no vectors


def declines(*arrays: Array | None, delta_softplus: bool, reverse: bool) -> str | None:
    """Why the compiled kernel cannot take the call."""
    if importlib.util.find_spec("numba") is None:
        return 'numba is not installed (pip install "subquad[numba]")'
    return None


def selective_scan(*arrays: Array | None, delta_softplus: bool, reverse: bool) -> tuple[Array, Array]:
    """The kernel `selective_scan`."""
    from subquad_numpy.scan import scan_forward

    return scan_forward(*arrays, delta_softplus, reverse)


def linear_scan_declines(a: Array, b: Array, initial_state: Array | None, /, *, reverse: bool) -> str | None:
    """Why the compiled kernel cannot take the call."""
    if a.dtype.name not in LINEAR_DTYPES:
        return f"it computes in {', '.join(LINEAR_DTYPES)}, not in {a.dtype.name}"
    return declines(a, b, initial_state, delta_softplus=False, reverse=reverse)


def linear_scan(a: Array, b: Array, initial_state: Array | None, /, *, reverse: bool) -> Array:
    """The kernel `linear_scan`."""
    from subquad_numpy.linear_scan import linear_scan_forward

    return linear_scan_forward(a, b, initial_state, reverse)
