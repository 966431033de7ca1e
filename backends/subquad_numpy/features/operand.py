"""One side of attention through features, that of queries or of keys: directions, center and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from subquad.kernels.feature_map import Elu, Exponential
from subquad_numpy.runtime.arguments import Constant, fix_elements, fix_items, fix_rows, row_step
from subquad_numpy.runtime.stored import computed

Array = np.ndarray[Any, Any]
Weights = Sequence[Any]  # of a feature map: (W_k, W_q), (W_k, W_q, q̄, k̄), or none


class Operand(NamedTuple):
    """Features exp(factor x W − h |x|²) of x = row − center; without W they are elu(factor x) + 1."""

    W: Array | None  # (…, d, m)
    factor: float = 1.0
    half_scale: float = 0.0  # h
    center: Array | None = None  # (…, d)

    @property
    def phi(self) -> str:
        """The name of the feature map in `features.phi.MAPS`."""
        return "elu" if self.W is None else "exponential"

    @property
    def batch(self) -> tuple[int, ...]:
        """The common batch shape of directions and center."""
        own = () if self.W is None else self.W.shape[:-2]
        return own if self.center is None else np.broadcast_shapes(own, self.center.shape[:-1])

    def width(self, d: int) -> int:
        """The number of features m of rows of d numbers."""
        return d if self.W is None else self.W.shape[-1]


def keys_of(phi: Elu | Exponential, weights: Weights) -> Operand:
    """The operand of the keys; with centers, W_k takes up the term scale q̄ · x of log φ."""
    if isinstance(phi, Elu):
        return Operand(None, phi.scale_k)
    W, _, *center = weights
    keys = Operand(W, half_scale=abs(phi.scale) / 2)
    if not center:
        return keys
    q_mean, k_mean = center
    return keys._replace(W=W + (phi.scale * q_mean).swapaxes(-1, -2), center=k_mean[..., 0, :])


def queries_of(phi: Elu | Exponential, weights: Weights) -> Operand:
    """The operand of the queries."""
    if isinstance(phi, Elu):
        return Operand(None, phi.scale_q)
    _, W, *center = weights
    return Operand(W, center=center[0][..., 0, :] if center else None)


class Rows:
    """Queries or keys of one form, and their operand, as fields of an argument record.

    A call gives the arrays of `SIDE` of `features.blocks` in their order, for rows and an operand of that form. None of
    the arrays that the form was taken from is kept.
    """

    def __init__(self, x: Array, operand: Operand) -> None:
        W, center = operand.W, operand.center
        self.fix_x, self.fix_W = fix_rows(x), None if W is None else fix_elements(W)
        self.fix_center = None if center is None else fix_items(center, 1)
        self.is_straight = self.fix_x is self.fix_W is self.fix_center is None
        self.numbers = Constant(np.array([operand.factor, operand.half_scale], computed(x.dtype)))

    def fields(self, x: Array, operand: Operand, prefix: str = "") -> dict[str, Any]:
        """The fields of the record for the arrays that the form was taken from."""
        rows, W, center, _ = self(x, operand.W, operand.center)
        W_row, W_column = (0, 0) if W is None else (stride // W.itemsize for stride in W.strides[-2:])
        own: dict[str, Any] = {"x_row": row_step(rows), "W_row": W_row, "W_column": W_column}
        own |= {"x": rows, "W": W, "center": center, "numbers": self.numbers}
        return {prefix + name: value for name, value in own.items()}

    def __call__(self, x: Array, W: Array | None, center: Array | None) -> tuple[Any, ...]:
        """(rows, directions, center, None) with strides that a kernel can read; (factor, h) are constant."""
        if self.fix_x is not None:
            x = self.fix_x(x)
        if self.fix_W is not None:
            W = self.fix_W(W)
        if self.fix_center is not None:
            center = self.fix_center(center)
        return x, W, center, None


def operand_from(
    make: Callable[[Any, Weights], Operand], phi: Elu | Exponential, weights: Weights
) -> Callable[..., Any]:
    """A function of weights that returns (W, center) of `make(phi, weights)`; without centers it only picks W."""
    if len(weights) > 2:

        def centred(weights: Weights) -> tuple[Array | None, Array | None]:
            operand = make(phi, weights)
            return operand.W, operand.center

        return centred
    if not weights:
        return lambda weights: (None, None)
    place = 0 if make is keys_of else 1
    return lambda weights: (weights[place], None)


def hide(xp: ModuleType, k: Any, v: Any, key_mask: Any) -> tuple[Any, Any, Any]:
    """(keys, values, start): hidden keys and values are 0, since 0 · NaN is NaN, and `start` is added to the logits."""
    if key_mask is None:
        return k, v, None
    keep = key_mask[..., None]
    start = xp.where(keep, xp.zeros((), dtype=k.dtype), -math.inf)
    return xp.where(keep, k, 0.0), xp.where(keep, v, 0.0), start
