"""Pseudo-inverses by iteration on NumPy arrays, compiled, as `subquad_numpy.compiled.Compiled` describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad_numpy.runtime.arguments import run

Array = np.ndarray[Any, Any]


def iterative_pinv(
    arrays: Sequence[Array], static: Mapping[str, Any], *, new: Callable[..., Array] = np.empty, save: bool = False,
    threads: int | None = None,
) -> tuple[tuple[Array], None]:  # fmt: skip
    """`iterative_pinv`: Z ≈ A⁺ of small matrices."""
    a, iterations = np.ascontiguousarray(arrays[0]), static["iterations"]
    z, m = new(a.shape, a.dtype), a.shape[-1]
    if a.size:
        from subquad_numpy.iterative_pinv.kernel import PINV_RECORD, pinv_kernel

        items, products = a.size // m**2, 4 * iterations * a.size * m
        run(pinv_kernel(a.dtype), PINV_RECORD, (), items, products, threads, m=m, iterations=iterations, a=a, z=z)
    return (z,), None
