"""Attention: every method with its default options."""

from collections.abc import Callable
from typing import Any

import numpy as np

import subquad

from .common import BACKENDS, HEADS, LENGTHS, D, Operator, draw_normal


class Attention(Operator):
    """Self-attention of HEADS heads, not causal, without a mask."""

    params = (BACKENDS, list(subquad.METHODS), LENGTHS)
    param_names = ("backend", "method", "n")

    def function(self, method: str, n: int) -> Callable[..., Any]:
        """A call of `subquad.attention`."""
        return lambda q, k, v: subquad.attention(q, k, v, method)

    def arrays(self, method: str, n: int) -> tuple[np.ndarray, ...]:
        """q, k and v."""
        return draw_normal(*3 * [(HEADS, n, D)])
