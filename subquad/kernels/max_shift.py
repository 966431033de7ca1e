"""Sums relative to exp(shift), shift the largest exponent so far: −∞ where there is no key yet."""

from __future__ import annotations

import math
from types import ModuleType

from subquad.backend import Array


def finite_shift(xp: ModuleType, shift: Array) -> Array:
    """The shift with 0 in place of −∞; NaN stays."""
    return xp.where(shift == -math.inf, 0.0, shift)


def rescale(xp: ModuleType, old: Array, new: Array) -> Array:
    """exp(old − new): the factor that turns a sum over exp(old) into one over exp(new)."""
    return xp.exp(old - finite_shift(xp, new))


def divide_or_zero(xp: ModuleType, numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, zero where the denominator is: the row sees no key, or what it sees cancels."""
    return numerator / xp.where(denominator == 0, math.inf, denominator)
