"""Numbers that are not finite in products with a triangular matrix: 0 · NaN would carry them to earlier steps."""

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
