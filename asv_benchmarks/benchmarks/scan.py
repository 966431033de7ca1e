"""The selective scan, with all that a Mamba layer gives it."""

from collections.abc import Callable
from typing import Any

import numpy as np

import subquad

from .common import BACKENDS, D_STATE, HEADS, D, Forward, Gradient, Operator, draw_normal
from .profiles import PROFILE


class Scan(Operator):
    """HEADS · D channels of D_STATE states each; softplus, skip connection and gate."""

    param_names = ("backend", "n")

    def function(self, n: int) -> Callable[..., Any]:
        """A call of `subquad.selective_scan`."""
        return lambda u, delta, A, B, C, D, z, bias: subquad.selective_scan(
            u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True
        )

    def arrays(self, n: int) -> tuple[np.ndarray, ...]:
        """u, delta, A, B, C, D, z and delta_bias; A and the step sizes as Mamba starts from them."""
        d = HEADS * D
        u, delta, z, B, C = draw_normal(*3 * [(1, n, d)], *2 * [(1, n, D_STATE)])
        A = np.tile(-np.arange(1, D_STATE + 1, dtype=np.float32), (d, 1))
        bias = np.full(d, np.log(np.expm1(0.01)), dtype=np.float32)  # softplus(bias) = 0.01
        return u, delta, A, B, C, np.ones(d, dtype=np.float32), z, bias


class SelectiveScan(Scan, Forward):
    """Forward."""

    params = (BACKENDS, PROFILE.lengths)


class SelectiveScanGradient(Scan, Gradient):
    """Forward and backward."""

    params = (BACKENDS, PROFILE.gradient_lengths)
