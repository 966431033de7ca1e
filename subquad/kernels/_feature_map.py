"""What a feature map is: φ = value · exp(log) of queries and of keys; and the two maps that fused kernels know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from subquad._arrays import broadcast_batch
from subquad._dispatch import Array

Features = tuple[Array | None, Array | None]  # (value, log)
RowMap = Callable[[Array], Features]
Center = tuple[Array, Array] | None  # (q̄, k̄), each (..., 1, d); None where both are 0


@dataclass(frozen=True)
class Exponential:
    """log φ(k) = x @ keys − |scale| |x|² / 2 + scale q̄·x of x = k − k̄, log φ(q) = (q − q̄) @ queries + any constant.

    keys and queries are (d, m).
    """

    keys: Array
    queries: Array
    scale: float
    center: Center = None

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All arrays, to differentiate by them."""
        return self.keys, self.queries, *(self.center or ())

    @property
    def without_arrays(self) -> Exponential:
        """What is left of it."""
        return Exponential(None, None, self.scale)

    def with_arrays(self, keys: Array, queries: Array, *center: Array) -> Exponential:
        """The same with these arrays."""
        return Exponential(keys, queries, self.scale, (center[0], center[1]) if center else None)


@dataclass(frozen=True)
class Elu:
    """φ = elu(y) + 1 = (1 + max(y, 0)) exp(min(y, 0)) of y = keys · k and of y = queries · q, two numbers."""

    keys: float
    queries: float

    @property
    def arrays(self) -> tuple[Array, ...]:
        """It holds none."""
        return ()

    @property
    def without_arrays(self) -> Elu:
        """Itself."""
        return self

    def with_arrays(self) -> Elu:
        """Itself."""
        return self


@dataclass(frozen=True)
class FeatureMap:
    """φ of keys, and of queries with a shift (..., 1, m) added to `log`, where a factor of a row may be left out.

    `m` features; `log` has `width` m or 1. `batch` is the batch shape that the map itself brings in. `fused` says the
    same where φ is no more than that: what a fused kernel needs to know.
    """

    keys: RowMap
    queries: Callable[[Array], RowMap]
    m: int
    width: int
    batch: tuple[int, ...] = ()
    fused: Exponential | Elu | None = None


def map_of(xp: ModuleType, phi: Exponential | Elu, d: int) -> FeatureMap:
    """The map that a fused kernel evaluates, of rows of d numbers."""
    return elu_map(xp, phi, d) if isinstance(phi, Elu) else exponential_map(xp, phi)


def elu_map(xp: ModuleType, phi: Elu, d: int) -> FeatureMap:
    """The map of an `Elu`. The gradient at 0 is 1 from either side."""

    def both(x: Array, factor: float) -> tuple[Array, Array]:
        y = x if factor == 1 else x * factor
        positive = y > 0
        return xp.where(positive, y, 0.0) + 1, xp.where(positive, 0.0, y)

    def queries(shift: Array) -> RowMap:
        def rows(q: Array) -> Features:
            value, log = both(q, phi.queries)
            return value, log + shift

        return rows

    return FeatureMap(lambda k: both(k, phi.keys), queries, d, d, fused=phi)


def exponential_map(xp: ModuleType, phi: Exponential) -> FeatureMap:
    """The map of an `Exponential`, one product for each side."""
    m = phi.keys.shape[-1]
    ones = xp.ones_like(phi.keys[:1, :])

    def keys(k: Array) -> Features:
        k, half_norm, own = centred_keys(xp, k, phi.scale, phi.center)
        shared = own - half_norm  # as one more column of k: no pass of its own over n × m
        k = xp.broadcast_to(k, (*shared.shape[:-1], k.shape[-1]))
        return None, xp.concat([k, shared], axis=-1) @ xp.concat([phi.keys, ones], axis=0)

    def queries(shift: Array) -> RowMap:
        weights = xp.broadcast_to(phi.queries, (*shift.shape[:-2], *phi.queries.shape))
        weights = xp.concat([weights, shift], axis=-2)

        def rows(q: Array) -> Features:
            q = q if phi.center is None else q - phi.center[0]
            return None, xp.concat([q, xp.ones_like(q[..., :1])], axis=-1) @ weights

        return rows

    return FeatureMap(keys, queries, m, m, batch_of(phi.center), phi)


def centred_keys(xp: ModuleType, k: Array, scale: float, center: Center) -> tuple[Array, Array, Array | float]:
    """x = k − k̄, |scale| |x|² / 2 and scale q̄·x, as q·x = (q − q̄)·x + q̄·x: the last term is the key's own."""
    own: Array | float = 0.0
    if center is not None:
        q_mean, k_mean = center
        k = k - k_mean
        own = xp.sum(q_mean * k, axis=-1, keepdims=True) * scale
    return k, xp.sum(k * k, axis=-1, keepdims=True) * (abs(scale) / 2), own


def batch_of(center: Center) -> tuple[int, ...]:
    """The batch shape that a center brings in."""
    return () if center is None else broadcast_batch(q_mean=center[0].shape[:-2], k_mean=center[1].shape[:-2])
