"""Pseudo-inverses by iteration on NumPy arrays, compiled: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fixed, run, straight, with_whole_items

Array = np.ndarray[Any, Any]


def _plan_pinv(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`iterative_pinv`: the pseudo-inverses Z ≈ A⁺ of small matrices."""
    (a,), iterations = arrays, static["iterations"]
    shape, dtype, m, run = a.shape, a.dtype, a.shape[-1], None
    fix = fix_items(a, a.ndim)
    if a.size:
        from subquad_numpy.iterative_pinv.kernel import PINV_RECORD, pinv_kernel

        numbers, products = {"m": m, "iterations": iterations}, 4 * iterations * a.size * m
        run = Run(pinv_kernel(dtype), PINV_RECORD, (), a.size // m**2, products, numbers)

    def invert(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array], None]:
        z = new(shape, dtype)
        if run is not None:
            run((fixed(fix, arrays[0]), z), threads)
        return (z,), None

    return straight(invert) if fix is None else invert


iterative_pinv = Forms(_plan_pinv)


def pinv_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], saved: None, outputs: Sequence[Any], grads: Sequence[Any],
    need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array]:  # fmt: skip
    """The gradient of `iterative_pinv`."""
    (a,), (grad,), iterations = arrays, grads, static["iterations"]
    by, m = np.empty(a.shape, a.dtype), a.shape[-1]
    if a.size:
        from subquad_numpy.iterative_pinv.gradient import GRADIENT_RECORD, pinv_gradient_kernel

        a, grad = (with_whole_items(x, x.ndim) for x in (a, grad))
        run(
            pinv_gradient_kernel(a.dtype), GRADIENT_RECORD, (), a.size // m**2, 15 * iterations * a.size * m, threads,
            m=m, iterations=iterations, a=a, grad_z=grad, grad_a=by,
        )  # fmt: skip
    return (by,)
