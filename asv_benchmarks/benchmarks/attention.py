"""Attention: every method with its default options."""

from collections.abc import Callable
from typing import Any

import numpy as np

import subquad

from .common import BACKENDS, HEADS, D, Forward, Gradient, Operator, draw_normal
from .profiles import PROFILE

NOT_CAUSAL = ("nystrom",)


class SelfAttention(Operator):
    """Self-attention of HEADS heads without a mask."""

    param_names = ("backend", "method", "causal", "n")

    def check(self, method: str, causal: bool, n: int) -> None:
        """A causal form, and a length that the method reaches."""
        longest = PROFILE.exact_gradient_up_to if self.gradient else PROFILE.exact_up_to
        check(method, causal, n, longest)

    def function(self, method: str, causal: bool, n: int) -> Callable[..., Any]:
        """A call of `subquad.attention`."""
        return lambda q, k, v: subquad.attention(q, k, v, method, causal=causal)

    def arrays(self, method: str, causal: bool, n: int) -> tuple[np.ndarray, ...]:
        """q, k and v."""
        return draw_normal(*3 * [(HEADS, n, D)])


class Attention(SelfAttention, Forward):
    """Forward."""

    params = (BACKENDS, list(subquad.METHODS), [False, True], PROFILE.lengths)


class AttentionGradient(SelfAttention, Gradient):
    """Forward and backward."""

    params = (BACKENDS, list(subquad.METHODS), [False, True], PROFILE.gradient_lengths)


def check(method: str, causal: bool, n: int = 0, longest: int = PROFILE.exact_up_to) -> None:
    """Raise NotImplementedError where there is nothing to measure."""
    if causal and method in NOT_CAUSAL:
        msg = f"{method} has no causal form"
        raise NotImplementedError(msg)
    if method == "exact" and n > longest:
        msg = f"exact attention is measured up to n = {longest}"
        raise NotImplementedError(msg)
