"""Numbers that are not finite: 0 · NaN is NaN, so that products and gradients would carry them to rows without them.

They are therefore 0 in what is computed, and rows that see one become NaN at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.loading import backend_of

Scan = Callable[[bool], tuple[Array, Array]]


def with_care(xp: ModuleType, scan: Scan, *arrays: Array | None) -> tuple[Array, Array]:
    """(state, output) of `scan(careful)`, careful unless the values can be read and nothing shows that care is due.

    `scan(False)` may let a number that is not finite reach earlier outputs, but such a number must reach the state too:
    a look at the state is a small part of a look at all inputs.
    """
    if backend_of(xp).is_concrete(*arrays):
        found = scan(False)
        if bool(xp.all(xp.isfinite(found[0]))):
            return found
    return scan(True)


def causal_product(xp: ModuleType, product: Callable[[Array], Array], x: Array, axis: int, lag: int = 0) -> Array:
    """`product(x)`, linear in x, with step t of the axis a sum over steps s ≤ t − lag; NaN where one is not finite."""
    finite = xp.isfinite(x)
    step = xp.arange(x.shape[axis], device=place_of(x))
    step = xp.reshape(step, (-1, *(1,) * (-1 - axis)))
    first = xp.min(xp.where(finite, x.shape[axis], step), axis=axis, keepdims=True)
    return xp.where(step - lag >= first, math.nan, product(xp.where(finite, x, 0.0)))


def all_finite(xp: ModuleType, *arrays: Array) -> bool:
    """Whether values can be read and every number is finite; False does not say that one is not."""
    return backend_of(xp).is_concrete(*arrays) and all(bool(xp.all(xp.isfinite(x))) for x in arrays)


def finite_rows(xp: ModuleType, x: Array) -> tuple[Array, Array]:
    """(x with 0 for its rows that are not finite, which rows (..., n, 1) are not)."""
    bad = ~xp.all(xp.isfinite(x), axis=-1, keepdims=True)
    return xp.where(bad, 0.0, x), bad


def spoilt(xp: ModuleType, x: Array, bad: Array) -> Array:
    """x, NaN where `bad`. There a gradient of 0 passes as 0, and any other one as infinity.

    The chain rule asks for NaN unless nothing depends on the number; 0 · NaN would be NaN even then.
    """
    backend, of_bad = backend_of(xp), xp.where(bad, x, 0.0)
    large = xp.where(bad, float(xp.finfo(x.dtype).max), xp.zeros_like(x))  # its square times the gradient overflows
    nothing = (of_bad - backend.constant(of_bad)) * large * large
    return xp.where(bad, math.nan, x) + nothing
