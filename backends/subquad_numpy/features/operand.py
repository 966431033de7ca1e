"""What queries or keys are multiplied with before the exponential: one side of attention through features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from subquad.kernels.feature_map import Elu, Exponential
from subquad_numpy.runtime.arguments import fix_elements, fix_items, fix_rows, row_step

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
        """The name of the map, as `features.phi.MAPS` has it."""
        return "elu" if self.W is None else "exponential"

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch shape that directions and center bring."""
        own = () if self.W is None else self.W.shape[:-2]
        return own if self.center is None else np.broadcast_shapes(own, self.center.shape[:-1])

    def width(self, d: int) -> int:
        """Number of features."""
        return d if self.W is None else self.W.shape[-1]


def keys_of(phi: Elu | Exponential, weights: Weights) -> Operand:
    """The side of the keys."""
    if isinstance(phi, Elu):
        return Operand(None, phi.scale_k)
    W, _, *center = weights
    keys = Operand(W, half_scale=abs(phi.scale) / 2)
    if not center:
        return keys
    q_mean, k_mean = center
    return keys._replace(W=W + (phi.scale * q_mean).swapaxes(-1, -2), center=k_mean[..., 0, :])


def queries_of(phi: Elu | Exponential, weights: Weights) -> Operand:
    """The side of the queries."""
    if isinstance(phi, Elu):
        return Operand(None, phi.scale_q)
    _, W, *center = weights
    return Operand(W, center=center[0][..., 0, :] if center else None)


class Rows:
    """Rows of queries or keys of one form, beside an operand of one form, as a kernel is told of them.

    `numbers_of_record` and `arrays_of_record` are fields of a record; called, it gives the arrays of `SIDE` of
    `features.blocks` in their order, for rows and an operand of that form.
    """

    def __init__(self, x: Array, operand: Operand) -> None:
        W, center = operand.W, operand.center
        self.fix_x, self.fix_W = fix_rows(x), None if W is None else fix_elements(W)
        self.fix_center = None if center is None else fix_items(center, 1)
        self.numbers = np.array([operand.factor, operand.half_scale], x.dtype)
        self.operand, self.example = operand, x

    def fields(self, prefix: str = "") -> dict[str, Any]:
        """The fields of the record, with the arrays that the form was taken from."""
        x, W, center, numbers = self(self.example, self.operand.W, self.operand.center)
        W_row, W_column = (0, 0) if W is None else (stride // W.itemsize for stride in W.strides[-2:])
        own: dict[str, Any] = {"x_row": row_step(x), "W_row": W_row, "W_column": W_column}
        own |= {"x": x, "W": W, "center": center, "numbers": numbers}
        return {prefix + name: value for name, value in own.items()}

    def __call__(self, x: Array, W: Array | None, center: Array | None) -> tuple[Array | None, ...]:
        """Rows, directions, center, and the numbers factor and h."""
        if self.fix_x is not None:
            x = self.fix_x(x)
        if self.fix_W is not None:
            W = self.fix_W(W)
        if self.fix_center is not None:
            center = self.fix_center(center)
        return x, W, center, self.numbers


def operand_from(
    make: Callable[[Any, Weights], Operand], phi: Elu | Exponential, weights: Weights
) -> Callable[..., Any]:
    """A function of weights of this form that gives W and center of `make(phi, weights)`, at no cost where it can."""
    if len(weights) > 2:

        def centred(weights: Weights) -> tuple[Array | None, Array | None]:
            operand = make(phi, weights)
            return operand.W, operand.center

        return centred
    if not weights:
        return lambda weights: (None, None)
    place = 0 if make is keys_of else 1
    return lambda weights: (weights[place], None)
