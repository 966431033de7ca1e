"""The logistic function in plain Array API."""

from __future__ import annotations

from types import ModuleType

from subquad.backend import Array


def sigmoid(xp: ModuleType, x: Array) -> Array:
    """1 / (1 + exp(−x)), by exp(−|x|), which cannot overflow."""
    e = xp.exp(xp.where(x > 0, -x, x))
    return xp.where(x > 0, xp.ones_like(e), e) / (1 + e)
