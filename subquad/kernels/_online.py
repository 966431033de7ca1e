"""Sums relative to exp(m), m the largest exponent so far: −∞ where there is no key yet."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from subquad._dispatch import Array

State = dict[str, Any]  # such sums by name, and their m


def finite(xp: ModuleType, maximum: Array) -> Array:
    """−∞ as 0; NaN stays."""
    return xp.where(maximum == -math.inf, 0.0, maximum)


def fade(xp: ModuleType, old: Array, new: Array) -> Array:
    """exp(old − new): what a sum over exp(old) is multiplied by, to be one over exp(new)."""
    return xp.exp(old - finite(xp, new))


def divide(xp: ModuleType, numerator: Array, denominator: Array) -> Array:
    """Zero where the denominator is: the row sees no key, or what it sees cancels."""
    return numerator / xp.where(denominator == 0, math.inf, denominator)
