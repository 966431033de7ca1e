"""The logistic function in plain Array API."""

from __future__ import annotations

from types import ModuleType

from subquad.backend import Array
from subquad.core.loading import backend_of


def sigmoid(xp: ModuleType, x: Array) -> Array:
    """1 / (1 + exp(−x)), by exp(−|x|), which cannot overflow, nor can its derivatives.

    A library that fills in place has no derivatives, and 1 / ∞ is the limit: it gets the formula as it stands, which
    takes a tenth of the time in NumPy, whose `where` is slow.
    """
    if backend_of(xp).fills_in_place:
        return 1 / (1 + xp.exp(-x))
    e = xp.exp(xp.where(x > 0, -x, x))
    return xp.where(x > 0, xp.ones_like(e), e) / (1 + e)
