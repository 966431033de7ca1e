"""What queries or keys are multiplied with before the exponential: one side of attention through features."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from subquad.kernels.feature_map import Elu, FeatureMap
from subquad_numpy.runtime.arguments import in_elements, row_step, with_whole_rows

Array = np.ndarray[Any, Any]


class Operand(NamedTuple):
    """Features exp(factor x W − h |x|²) of x = row − center; without W they are elu(factor x) + 1."""

    W: Array | None  # (…, d, m)
    factor: float = 1.0
    half_scale: float = 0.0  # h
    center: Array | None = None  # (…, d)

    @property
    def is_elu(self) -> bool:
        """Whether the features are elu(factor x) + 1."""
        return self.W is None

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch shape that directions and center bring."""
        own = () if self.W is None else self.W.shape[:-2]
        return own if self.center is None else np.broadcast_shapes(own, self.center.shape[:-1])

    def width(self, d: int) -> int:
        """Number of features."""
        return d if self.W is None else self.W.shape[-1]

    def fields(self, x: Array) -> dict[str, Any]:
        """What a kernel is told of rows x on this side: `SIDE` of `blocks`."""
        x, W = with_whole_rows(x), None if self.W is None else in_elements(self.W)
        W_row, W_column = (0, 0) if W is None else (stride // W.itemsize for stride in W.strides[-2:])
        center = None if self.center is None else np.ascontiguousarray(self.center)
        numbers = np.array([self.factor, self.half_scale], x.dtype)
        return {
            "x_row": row_step(x), "W_row": W_row, "W_column": W_column, "x": x, "W": W, "center": center,
            "numbers": numbers,
        }  # fmt: skip


def keys_of(phi: FeatureMap, weights: tuple[Array | None, ...]) -> Operand:
    """The side of the keys."""
    if isinstance(phi, Elu):
        return Operand(None, phi.scale_k)
    W, _, *center = weights
    keys = Operand(W, half_scale=abs(phi.scale) / 2)
    if not center:
        return keys
    q_mean, k_mean = center
    return keys._replace(W=W + (phi.scale * q_mean).swapaxes(-1, -2), center=k_mean[..., 0, :])


def queries_of(phi: FeatureMap, weights: tuple[Array | None, ...]) -> Operand:
    """The side of the queries."""
    if isinstance(phi, Elu):
        return Operand(None, phi.scale_q)
    _, W, *center = weights
    return Operand(W, center=center[0][..., 0, :] if center else None)
