"""Feature maps: φ = value · exp(log) of queries and of keys. A map is a frozen dataclass without arrays.

The arrays of a map, its *weights*, are arguments of a kernel like queries and keys. So a kernel can be differentiated
by the weights, and the map can be hashed when an implementation is chosen. Compiled kernels know two maps,
`Exponential` and `Elu`.

    map            weights                                           m          columns of shift
    Exponential    W_k, W_q (..., d, m), [q̄, k̄]                      m          m
    Elu            none                                              d          d
    Trigonometric  W_k, W_q (d, m/2), [q̄, k̄]                         m          1
    Elementwise    W_k, W_q (d, m)                                   m          1 (log is None)
    Rowwise        none                                              m          1 (log is None)

[q̄, k̄] are (..., 1, d) each, and are given if queries and keys are centred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from subquad.backend import Array
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch

Features = tuple[Array | None, Array | None]  # (value, log)
MapRows = Callable[[Array], Features]
TINY = 2.0**-40  # rows of smaller numbers are divided by it


@dataclass(frozen=True)
class FeatureMap:
    """Base of the maps of rows to features (value, log), φ = value · exp(log).

    `value` is (..., n, m) or None for 1; `log` is (..., n, m), (..., n, 1) or None for 0.
    """

    def sizes(self, d: int, *weights: Array) -> tuple[int, int]:
        """(m, number of columns of the shift: m or 1) for rows of d numbers."""
        raise NotImplementedError

    def batch(self, *weights: Array) -> tuple[int, ...]:
        """The batch shape that the weights bring to a whole call."""
        return center_batch(weights[2:])

    def batch_of_keys(self, *weights: Array) -> tuple[int, ...]:
        """The batch shape that the weights bring to sums over keys."""
        return self.batch(*weights)

    def map_keys(self, xp: ModuleType, k: Array, *weights: Array) -> Features:
        """(value, log) of keys k (..., n, d)."""
        raise NotImplementedError

    def map_queries(self, xp: ModuleType, shift: Array, *weights: Array) -> MapRows:
        """A function from queries (..., n, d) to (value, log + shift), with `shift` (..., 1, m or 1).

        A factor common to all features of a row may be left out, since it cancels in the output.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Exponential(FeatureMap):
    """log φ(k) = x W_k − |scale| |x|²/2 + scale q̄·x of x = k − k̄,    log φ(q) = (q − q̄) W_q + any constant.

    Weights: W_k and W_q (..., d, m), then q̄ and k̄ (..., 1, d) if rows are centred. With `scale` 0 there is no norm term
    and no centring: exp(k W_k) are the weights of softmax attention at m landmarks, and W_q may be None.
    """

    scale: float

    def sizes(self, d: int, *weights: Array) -> tuple[int, int]:
        m = weights[0].shape[-1]
        return m, m

    def batch(self, *weights: Array) -> tuple[int, ...]:
        W_q = None if weights[1] is None else weights[1].shape[:-2]
        return broadcast_batch(weights=W_q, center=center_batch(weights[2:]))

    def batch_of_keys(self, *weights: Array) -> tuple[int, ...]:
        return broadcast_batch(weights=weights[0].shape[:-2], center=center_batch(weights[2:]))

    def map_keys(self, xp: ModuleType, k: Array, *weights: Array) -> Features:
        W_k, _, *center = weights
        if self.scale == 0:
            return None, k @ W_k
        k, half_norm, own = centred_keys(xp, k, self.scale, center)
        shared = own - half_norm  # appended to k as one more column, which saves a pass over n × m numbers
        k = xp.broadcast_to(k, (*shared.shape[:-1], k.shape[-1]))
        return None, xp.concat([k, shared], axis=-1) @ xp.concat([W_k, xp.ones_like(W_k[..., :1, :])], axis=-2)

    def map_queries(self, xp: ModuleType, shift: Array, *weights: Array) -> MapRows:
        _, W_q, *center = weights
        batch = broadcast_batch(weights=W_q.shape[:-2], shift=shift.shape[:-2])
        parts = [xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (W_q, shift)]
        with_shift = xp.concat(parts, axis=-2)

        def rows(q: Array) -> Features:
            q = q - center[0] if center else q
            return None, xp.concat([q, xp.ones_like(q[..., :1])], axis=-1) @ with_shift

        return rows


@dataclass(frozen=True)
class Elu(FeatureMap):
    """φ = elu(y) + 1 = (1 + max(y, 0)) exp(min(y, 0)), with y = scale_k · k or y = scale_q · q; no weights."""

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

    Weights: as `Exponential`. W_k and W_q have m/2 columns, one for each pair (cos, sin).
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
    """φ(x) = f(x W) + ε, where f is max(·, 0) or a function that the user gives. Weights: W_k and W_q (d, m)."""

    function: str | Callable[[Array], Array]  # "relu", or f itself
    epsilon: float = 0.0

    def sizes(self, d: int, *weights: Array) -> tuple[int, int]:
        return weights[0].shape[-1], 1

    def map_keys(self, xp: ModuleType, k: Array, *weights: Array) -> Features:
        return self._apply(xp, k @ weights[0]), None

    def map_queries(self, xp: ModuleType, shift: Array, *weights: Array) -> MapRows:
        def rows(q: Array) -> tuple[Array, None]:
            if self.function == "relu" and not self.epsilon:  # a factor of a row has no effect on its output
                q = _not_tiny(xp, q)
            return self._apply(xp, q @ weights[1]), None

        return rows

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
    """φ(k) = f(scale_k k) and φ(q) = f(scale_q q), where f is a function of the user; no weights.

    f takes rows (..., n, d) to features (..., n, m).
    """

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
    """`function(x · factor)` of rows x (..., n, d); ValueError unless it returns one row for each row."""
    x = x if factor == 1 else x * factor
    features = function(x)
    if getattr(features, "shape", ())[:-1] != x.shape[:-1]:
        got = getattr(features, "shape", type(features).__name__)
        msg = f"feature_map must return one row per row: given shape {tuple(x.shape)}, it returned {got}"
        raise ValueError(msg)
    return features


def centred_keys(xp: ModuleType, k: Array, scale: float, center: list[Array]) -> tuple[Array, Array, Array | float]:
    """(x, |scale| |x|²/2, scale q̄·x) with x = k − k̄.

    Since q·x = (q − q̄)·x + q̄·x, the term scale q̄·x depends on the key alone and joins its exponent.
    """
    own: Array | float = 0.0
    if center:
        q_mean, k_mean = center
        k = k - k_mean
        own = xp.sum(q_mean * k, axis=-1, keepdims=True) * scale
    return k, xp.sum(k * k, axis=-1, keepdims=True) * (abs(scale) / 2), own


def center_batch(center: tuple[Array, ...]) -> tuple[int, ...]:
    """The common batch shape of q̄ and k̄; () without them."""
    return broadcast_batch(q_mean=center[0].shape[:-2], k_mean=center[1].shape[:-2]) if center else ()


def _elu_plus_one(xp: ModuleType, x: Array, factor: float) -> tuple[Array, Array]:
    """(value, log) of elu(y) + 1 with y = factor · x. At y = 0 the gradient is 1 from either side."""
    y = x if factor == 1 else x * factor
    positive = y > 0
    return xp.where(positive, y, 0.0) + 1, xp.where(positive, 0.0, y)


def _not_tiny(xp: ModuleType, x: Array) -> Array:
    """The rows of x, those of tiny numbers times a power of two: products with tiny keys have a finite inverse."""
    size = backend_of(xp).constant(xp.max(xp.abs(x), axis=-1, keepdims=True))
    if backend_of(xp).is_concrete(size) and not bool(xp.any(size < TINY)):
        return x
    return x * xp.where(size < TINY**2, TINY**-2, xp.where(size < TINY, 1 / TINY, 1.0))


def _waves(xp: ModuleType, projected: Array) -> Array:
    # [cos, sin] of the projections, (..., n, 2 · columns)
    return xp.concat([xp.cos(projected), xp.sin(projected)], axis=-1)
