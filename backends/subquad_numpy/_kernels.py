"""The compiled scans as overrides of the kernels; Numba is imported at the first call."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def declines(*arrays: Array | None, delta_softplus: bool, reverse: bool) -> str | None:
    """Why the compiled kernel cannot take the call."""
    if importlib.util.find_spec("numba") is None:
        return 'numba is not installed (pip install "subquad[numba]")'
    return None


def selective_scan(*arrays: Array | None, delta_softplus: bool, reverse: bool) -> tuple[Array, Array]:
    """The kernel `selective_scan`."""
    from subquad_numpy.scan import scan_forward

    return scan_forward(*arrays, delta_softplus, reverse)
