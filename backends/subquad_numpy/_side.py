"""What queries or keys are multiplied with before the exponential: one side of attention through features."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from subquad.kernels._feature_map import Elu, Exponential
from subquad_numpy._frame import in_elements

Array = np.ndarray[Any, Any]


class Side(NamedTuple):
    """Features exp(factor x W − h |x|²) of x = row − center; without W they are elu(factor x) + 1."""

    W: Array | None  # (…, d, m)
    factor: float = 1.0
    half_scale: float = 0.0  # h
    center: Array | None = None  # (…, d)

    @property
    def is_elu(self) -> bool:
        """Whether the features are elu(factor x) + 1."""
        return self.W is None

    def width(self, d: int) -> int:
        """Number of features."""
        return d if self.W is None else self.W.shape[-1]

    def in_memory(self) -> Side:
        """With arrays as the kernels take them."""
        W, center = self.W, self.center
        return self._replace(
            W=None if W is None else in_elements(W), center=None if center is None else np.ascontiguousarray(center)
        )

    @property
    def steps(self) -> tuple[int, int]:
        """Elements from row to row of W and from column to column."""
        if self.W is None:
            return 0, 0
        row, step = (stride // self.W.itemsize for stride in self.W.strides[-2:])
        return row, step


def sides_of(phi: Exponential | Elu) -> tuple[Side, Side]:
    """Keys and queries."""
    if isinstance(phi, Elu):
        return Side(None, phi.keys), Side(None, phi.queries)
    keys, queries = Side(phi.keys, half_scale=abs(phi.scale) / 2), Side(phi.queries)
    if phi.center is None:
        return keys, queries
    q_mean, k_mean = phi.center
    W = phi.keys + (phi.scale * q_mean).swapaxes(-1, -2)
    return keys._replace(W=W, center=k_mean[..., 0, :]), queries._replace(center=q_mean[..., 0, :])
