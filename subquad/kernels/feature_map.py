"""What a feature map is: φ = value · exp(log) of queries and of keys. A map is a value without arrays.

The arrays of a map, its *weights*, go beside it: they are arguments of a kernel like queries and keys, so that a
kernel can be differentiated by them and its choice depends on what can be hashed. Two maps are known to compiled
kernels: `Exponential` and `Elu`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from subquad.backend import Array
from subquad.core.shapes import broadcast_batch

Features = tuple[Array | None, Array | None]  # (value, log)
MapRows = Callable[[Array], Features]


@dataclass(frozen=True)
class FeatureMap:
    """A map of rows to features. `value` (..., n, m) or None for 1; `log` (..., n, m), (..., n, 1) or None for 0."""

    def sizes(self, d: int, *weights: Array) -> tuple[int, int]:
        """(m, number of columns of `log`: m, or 1) for rows of d numbers."""
        raise NotImplementedError

    def batch(self, *weights: Array) -> tuple[int, ...]:
        """The batch shape that the weights bring to a whole call."""
        return center_batch(weights[2:])

    def batch_of_keys(self, *weights: Array) -> tuple[int, ...]:
        """The batch shape that the weights bring to sums over keys."""
        return self.batch(*weights)

    def map_keys(self, xp: ModuleType, k: Array, *weights: Array) -> Features:
        """φ of keys."""
        raise NotImplementedError

    def map_queries(self, xp: ModuleType, shift: Array, *weights: Array) -> MapRows:
        """φ of queries with `shift` (..., 1, m or 1) added to `log`; a factor of a whole row may be left out."""
        raise NotImplementedError


@dataclass(frozen=True)
class Exponential(FeatureMap):
    """log φ(k) = x W_k − |scale| |x|²/2 + scale q̄·x of x = k − k̄,    log φ(q) = (q − q̄) W_q + any constant.

    Weights: W_k (..., d, m), W_q (d, m), then, where rows are centred, q̄ and k̄ (..., 1, d). `scale` 0 leaves the plain
    exponentials exp(k W_k) of softmax attention at m landmarks; W_q may then be None.
    """

    scale: float

    def sizes(self, d: int, *weights: Array) -> tuple[int, int]:
        m = weights[0].shape[-1]
        return m, m

    def batch_of_keys(self, *weights: Array) -> tuple[int, ...]:
        return broadcast_batch(weights=weights[0].shape[:-2], center=self.batch(*weights))

    def map_keys(self, xp: ModuleType, k: Array, *weights: Array) -> Features:
        W_k, _, *center = weights
        if self.scale == 0:
            return None, k @ W_k
        k, half_norm, own = centred_keys(xp, k, self.scale, center)
        shared = own - half_norm  # as one more column of k: no pass of its own over n × m
        k = xp.broadcast_to(k, (*shared.shape[:-1], k.shape[-1]))
        return None, xp.concat([k, shared], axis=-1) @ xp.concat([W_k, xp.ones_like(W_k[..., :1, :])], axis=-2)

    def map_queries(self, xp: ModuleType, shift: Array, *weights: Array) -> MapRows:
        _, W_q, *center = weights
        with_shift = xp.broadcast_to(W_q, (*shift.shape[:-2], *W_q.shape))
        with_shift = xp.concat([with_shift, shift], axis=-2)

        def rows(q: Array) -> Features:
            q = q - center[0] if center else q
            return None, xp.concat([q, xp.ones_like(q[..., :1])], axis=-1) @ with_shift

        return rows


@dataclass(frozen=True)
class Elu(FeatureMap):
    """φ = elu(y) + 1 = (1 + max(y, 0)) exp(min(y, 0)) of y = scale_k · k and of y = scale_q · q. It has no weights."""

    scale_k: float
    scale_q: float

    def sizes(self, d: int, *weights: Array) -> tuple[int, int]:
        return d, d

    def map_keys(self, xp: ModuleType, k: Array, *weights: Array) -> Features:
        return _elu_plus_one(xp, k, self.scale_k)

    def map_queries(self, xp: ModuleType, shift: Array, *weights: Array) -> MapRows:
        def rows(q: Array) -> Features:
            value, log = _elu_plus_one(xp, q, self.scale_q)
            return value, log + shift

        return rows


@dataclass(frozen=True)
class Trigonometric(FeatureMap):
    """[cos x W_k, sin x W_k] exp(|scale| |x|²/2 + scale q̄·x) of x = k − k̄, and [cos, sin] of (q − q̄) W_q.

    Weights: those of `Exponential`; there are twice as many features as columns.
    """

    scale: float

    def sizes(self, d: int, *weights: Array) -> tuple[int, int]:
        return 2 * weights[0].shape[-1], 1

    def map_keys(self, xp: ModuleType, k: Array, *weights: Array) -> Features:
        W_k, _, *center = weights
        k, half_norm, own = centred_keys(xp, k, self.scale, center)
        return _waves(xp, k @ W_k), half_norm + own

    def map_queries(self, xp: ModuleType, shift: Array, *weights: Array) -> MapRows:
        _, W_q, *center = weights
        return lambda q: (_waves(xp, (q - center[0] if center else q) @ W_q), None)


@dataclass(frozen=True)
class Elementwise(FeatureMap):
    """f(x W) + ε with f = max(·, 0) or a function of the user's. Weights: W_k and W_q (d, m)."""

    function: str | Callable[[Array], Array]  # "relu", or f itself
    epsilon: float = 0.0

    def sizes(self, d: int, *weights: Array) -> tuple[int, int]:
        return weights[0].shape[-1], 1

    def map_keys(self, xp: ModuleType, k: Array, *weights: Array) -> Features:
        return self._apply(xp, k @ weights[0]), None

    def map_queries(self, xp: ModuleType, shift: Array, *weights: Array) -> MapRows:
        return lambda q: (self._apply(xp, q @ weights[1]), None)

    def _apply(self, xp: ModuleType, projected: Array) -> Array:
        if isinstance(self.function, str):
            value = xp.where(projected < 0, 0.0, projected)
        else:
            value = self.function(projected)
            if getattr(value, "shape", None) != projected.shape:
                got = getattr(value, "shape", type(value).__name__)
                msg = f"features must map elementwise: given shape {tuple(projected.shape)}, it returned {got}"
                raise ValueError(msg)
        return value + self.epsilon if self.epsilon else value


@dataclass(frozen=True)
class Rowwise(FeatureMap):
    """A function of the user's that takes rows (..., n, d), times scale_k or scale_q, to features (..., n, m)."""

    function: Callable[[Array], Array]
    scale_k: float
    scale_q: float
    m: int

    def sizes(self, d: int, *weights: Array) -> tuple[int, int]:
        return self.m, 1

    def map_keys(self, xp: ModuleType, k: Array, *weights: Array) -> Features:
        return map_rows(self.function, k, self.scale_k), None

    def map_queries(self, xp: ModuleType, shift: Array, *weights: Array) -> MapRows:
        return lambda q: (map_rows(self.function, q, self.scale_q), None)


def map_rows(function: Callable[[Array], Array], x: Array, factor: float = 1.0) -> Array:
    """`function` of the rows x times `factor`; ValueError unless it gives one row for each."""
    x = x if factor == 1 else x * factor
    features = function(x)
    if getattr(features, "shape", ())[:-1] != x.shape[:-1]:
        got = getattr(features, "shape", type(features).__name__)
        msg = f"feature_map must return one row per row: given shape {tuple(x.shape)}, it returned {got}"
        raise ValueError(msg)
    return features


def centred_keys(xp: ModuleType, k: Array, scale: float, center: list[Array]) -> tuple[Array, Array, Array | float]:
    """x = k − k̄, |scale| |x|²/2 and scale q̄·x, as q·x = (q − q̄)·x + q̄·x: the last term is the key's own."""
    own: Array | float = 0.0
    if center:
        q_mean, k_mean = center
        k = k - k_mean
        own = xp.sum(q_mean * k, axis=-1, keepdims=True) * scale
    return k, xp.sum(k * k, axis=-1, keepdims=True) * (abs(scale) / 2), own


def center_batch(center: tuple[Array, ...]) -> tuple[int, ...]:
    """The batch shape of q̄ and k̄ together; () where there are none."""
    return broadcast_batch(q_mean=center[0].shape[:-2], k_mean=center[1].shape[:-2]) if center else ()


def _elu_plus_one(xp: ModuleType, x: Array, factor: float) -> tuple[Array, Array]:
    """(value, log) of elu + 1. The gradient at 0 is 1 from either side."""
    y = x if factor == 1 else x * factor
    positive = y > 0
    return xp.where(positive, y, 0.0) + 1, xp.where(positive, 0.0, y)


def _waves(xp: ModuleType, projected: Array) -> Array:
    return xp.concat([xp.cos(projected), xp.sin(projected)], axis=-1)
