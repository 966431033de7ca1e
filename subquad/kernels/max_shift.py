"""Arithmetic of sums that are stored divided by exp(shift).

The shift is the largest exponent so far, and −∞ as long as there is no key.
"""

from __future__ import annotations

import math
from types import ModuleType

from subquad.backend import Array


def finite_shift(xp: ModuleType, shift: Array) -> Array:
    """The shift with −∞ replaced by 0, which may be subtracted safely; NaN stays NaN."""
    return xp.where(shift == -math.inf, 0.0, shift)


def rescale(xp: ModuleType, old: Array, new: Array) -> Array:
    """exp(old − new): the factor that turns a sum over exp(old) into one over exp(new)."""
    return xp.exp(old - finite_shift(xp, new))


def divide_or_zero(xp: ModuleType, numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, and 0 where the denominator is 0: the row sees no key, or its weights cancel."""
    return numerator / xp.where(denominator == 0, math.inf, denominator)


def bounded(xp: ModuleType, x: Array) -> Array:
    """x within a 64th of the range of its dtype, so that sums with it are finite; NaN stays NaN.

    For squares of logits, which overflow long before logits do.
    """
    most = float(xp.finfo(x.dtype).max) / 64
    return xp.clip(x, -most, most)
