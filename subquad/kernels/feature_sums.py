"""Sums over keys of attention through features, and the features in them: what its three kernels share.

The letters are those of `feature_attention`.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.feature_map import FeatureMap, Features
from subquad.kernels.max_shift import finite_shift, rescale


class Sums(NamedTuple):
    """A state with the shift transposed to (..., 1, m or 1), so that it broadcasts against exponents (..., n, m)."""

    shift: Array
    numerator: Array
    denominator: Array

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch shape of the state."""
        return tuple(self.denominator.shape[:-2])

    def outside(self, xp: ModuleType) -> tuple[Array, Array, Array]:
        """(shift, numerator, denominator) in the shapes of a state, the shift (..., m or 1, 1) again."""
        return xp.matrix_transpose(self.shift), self.numerator, self.denominator


def keys_batch(
    phi: FeatureMap, weights: tuple[Any, ...], k: Array, v: Array, key_mask: Array | None, held: Array | None = None
) -> tuple[int, ...]:
    """The batch shape of sums over keys that continue a state; `held` is its denominator, None without a state."""
    return broadcast_batch(
        state=None if held is None else held.shape[:-2],
        k=k.shape[:-2],
        v=v.shape[:-2],
        key_mask=None if key_mask is None else key_mask.shape[:-1],
        center=phi.batch_of_keys(*weights),
    )


def sums_before(
    xp: ModuleType, phi: FeatureMap, weights: tuple[Array, ...], k: Array, v: Array, key_mask: Array | None,
    shift: Array | None, numerator: Array | None, denominator: Array | None,
) -> Sums:  # fmt: skip
    """The state before new keys, broadcast to the batch shape after them: a traced loop carries one shape."""
    batch = keys_batch(phi, weights, k, v, key_mask, denominator)
    if denominator is None or shift is None or numerator is None:
        (m, width), where = phi.sizes(k.shape[-1], *weights), place_of(k)
        return Sums(
            xp.full((*batch, 1, width), -math.inf, dtype=k.dtype, device=where),
            xp.zeros((*batch, m, v.shape[-1]), dtype=k.dtype, device=where),
            xp.zeros((*batch, m, 1), dtype=k.dtype, device=where),
        )
    sums = Sums(xp.matrix_transpose(shift), numerator, denominator)
    return Sums(*(x if tuple(x.shape[:-2]) == batch else xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in sums))


def add_block(xp: ModuleType, sums: Sums, v: Array, value: Array | None, log: Array | None) -> Sums:
    """The sums after adding the keys of a block; the shift grows to the largest `log` of the block."""
    if log is None:
        shift, phi_k, faded = xp.zeros_like(sums.shift), value, 1.0
    else:
        shift = xp.maximum(sums.shift, xp.max(log, axis=-2, keepdims=True))
        phi_k = exp_difference(xp, log, finite_shift(xp, shift))
        phi_k = phi_k if value is None else phi_k * value
        faded = xp.matrix_transpose(rescale(xp, sums.shift, shift))  # (..., m or 1, 1)
    more = sums_of(xp, shift, phi_k, v)
    return Sums(shift, sums.numerator * faded + more.numerator, sums.denominator * faded + more.denominator)


def sums_of(xp: ModuleType, shift: Array, phi_k: Array, v: Array) -> Sums:
    """The sums over keys of features that are divided by exp(shift)."""
    return Sums(shift, xp.matrix_transpose(phi_k) @ v, xp.matrix_transpose(xp.sum(phi_k, axis=-2, keepdims=True)))


def shown(xp: ModuleType, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
    """k and v with hidden rows set to 0: a NaN there would reach products and their gradients, since 0 · NaN is NaN."""
    return (k, v) if mask is None else (xp.where(mask, k, 0.0), xp.where(mask, v, 0.0))


def hide(xp: ModuleType, features: Features, mask: Array | None) -> Features:
    """(value, log) of keys with φ = 0 for the keys that the mask hides."""
    value, log = features
    if mask is None:
        return value, log
    hidden = None if value is None else xp.where(mask, value, 0.0)
    return hidden, None if log is None else xp.where(mask, log, -math.inf)


def query_features(xp: ModuleType, features: Features, shift: Array) -> tuple[Array, Array]:
    """(φ(q) exp(−level), level) of features (value, log) whose `log` includes the shift; level is the max of each row.

    A factor that a whole row has in common cancels in the output. If `log` is None, the level is the shift given.
    """
    value, log = features
    if log is None:
        return value, shift
    level = xp.max(log, axis=-1, keepdims=True)
    phi = exp_difference(xp, log, level)
    return (phi if value is None else phi * value), level


def exp_difference(xp: ModuleType, x: Array, y: Array) -> Array:
    """exp(x − y), by the backend, which may overwrite x: the caller must not use x again."""
    return backend_of(xp).exp_difference(xp, x, y)
