"""Pseudo-inverses by iteration on NumPy arrays, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from subquad_numpy.iterative_pinv.kernel import PINV_RECORD, pinv_kernel
from subquad_numpy.runtime.arguments import run

Array = np.ndarray[Any, Any]


def iterative_pinv(a: Array, /, *, iterations: int, threads: int | None = None) -> Array:
    """The kernel `iterative_pinv`."""
    a = np.ascontiguousarray(a)
    z, m = np.empty_like(a), a.shape[-1]
    if a.size:
        items, products = a.size // m**2, 4 * iterations * a.size * m
        run(pinv_kernel(a.dtype), PINV_RECORD, (), items, products, threads, m=m, iterations=iterations, a=a, z=z)
    return z
