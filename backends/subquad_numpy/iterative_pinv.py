"""Pseudo-inverses by iteration on NumPy arrays, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from subquad_numpy._frame import run
from subquad_numpy._iterative_pinv import PINV_FRAME, pinv_kernel

Array = np.ndarray[Any, Any]


def iterative_pinv(a: Array, /, *, iterations: int, threads: int | None = None) -> Array:
    """The kernel `iterative_pinv`."""
    a = np.ascontiguousarray(a)
    z, m = np.empty_like(a), a.shape[-1]
    if a.size:
        items, products = a.size // m**2, 4 * iterations * a.size * m
        run(pinv_kernel(a.dtype), PINV_FRAME, (), items, products, threads, m=m, iterations=iterations, a=a, z=z)
    return z
