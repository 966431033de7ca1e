"""Clusters of keys by content: which keys lie together, and what a cluster tells without being opened.

Keys are clustered in the metric in which queries tell them apart: rows k Σ^¼ with Σ = E[q qᵀ]. The mean of
(q·(k − μ))² over queries is the squared length of (k − μ) Σ^½; the quarter power is between that and the plain length.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.gather import gather_rows
from subquad.core.loading import backend_of
from subquad.kernels.balanced_tree import balanced_tree
from subquad.random import generator

POWER = 0.25
DIRECTIONS = 32  # random directions by which the row farthest from the mean is found
SMALLEST = 1e-6  # least eigenvalue of Σ, as a fraction of the largest


class KeyClusters(NamedTuple):
    """C clusters of `size` places each; the keys of a cluster fill its first places."""

    k: Array  # (..., C · d, size), the keys of a cluster as columns, one cluster after the other
    v: Array  # (..., C · size, d_v)
    order: Array  # (..., C · size), int32: the place of each key in the sequence
    counts: Array  # (..., C), int32: how many places hold a key
    means: Array  # (..., C, d)
    spread: Array  # (..., C, d): variance of each channel
    mean_values: Array  # (..., C, d_v)


def query_metric(xp: ModuleType, moment: Array) -> Array:
    """The matrix Σ^¼ (..., d, d) of moments Σ (..., d, d), up to a factor; the identity where Σ is 0 or not finite.

    It is constant for gradients.
    """
    moment = backend_of(xp).constant(moment)
    d = moment.shape[-1]
    identity = xp.eye(d, dtype=moment.dtype, device=place_of(moment))
    trace = xp.sum(moment * identity, axis=(-2, -1), keepdims=True)
    usable = (trace > 0) & xp.all(xp.isfinite(moment), axis=(-2, -1), keepdims=True)
    moment = xp.where(usable, moment / xp.where(usable, trace, 1.0), identity / d)
    values, vectors = xp.linalg.eigh(moment)
    least = SMALLEST * values[..., -1:]
    root = xp.where(values > least, values, least) ** POWER
    return (vectors * root[..., None, :]) @ xp.matrix_transpose(vectors)


def find_order(
    xp: ModuleType, k: Array, metric: Array | None, seen: Array | None, size: int, seed: int, implementation: str
) -> Array:
    """The numbers of keys (..., n, d) in clusters of `size`, int32 (..., ⌈n / size⌉ · size); hidden keys come last.

    Without a metric, keys that are near lie together. The order does not depend on other items; it is constant for
    gradients.
    """
    sketch = backend_of(xp).on_host(_directions, k.shape[-1], seed)
    sketch = xp.asarray(sketch, dtype=k.dtype, device=place_of(k))
    k = backend_of(xp).constant(k)
    seen = None if seen is None else xp.broadcast_to(seen, k.shape[:-1])
    rows = k if metric is None else k @ metric
    return balanced_tree(rows, sketch, size=size, key_mask=seen, implementation=implementation)


def summarize_clusters(xp: ModuleType, k: Array, v: Array, order: Array, counts: Array, size: int) -> KeyClusters:
    """The clusters of keys k (..., n, d) and values v for an order (..., C · size) and numbers of keys (..., C)."""
    k, v = (gather_rows(xp, x, order) for x in (k, v))
    place = xp.arange(size, dtype=xp.int32, device=place_of(k))
    holds = (place < counts[..., None])[..., None]  # (..., C, size, 1)
    share = xp.astype(holds, k.dtype) / xp.astype(xp.where(counts > 0, counts, 1), k.dtype)[..., None, None]

    def mean(x: Array) -> Array:
        rows = xp.reshape(x, (*x.shape[:-2], counts.shape[-1], size, x.shape[-1]))
        return xp.sum(xp.where(holds, rows, 0.0) * share, axis=-2)

    means = mean(k)
    far = k - xp.reshape(xp.broadcast_to(means[..., None, :], (*means.shape[:-1], size, means.shape[-1])), k.shape)
    spread, of_values = mean(far * far), mean(v)
    clusters, d = means.shape[-2:]
    columns = xp.matrix_transpose(xp.reshape(k, (*k.shape[:-2], clusters, size, d)))
    columns = xp.reshape(columns, (*k.shape[:-2], clusters * d, size))
    return KeyClusters(columns, v, order, counts, means, spread, of_values)


def counts_of(xp: ModuleType, seen: Array, size: int) -> Array:
    """How many of the keys of each cluster are seen, (..., C), int32, for an order that has hidden keys last."""
    clusters = -(-seen.shape[-1] // size)
    total = xp.sum(xp.astype(seen, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
    first = xp.arange(clusters, dtype=xp.int32, device=place_of(seen)) * size
    return xp.clip(total - first, 0, size)


def _directions(d: int, seed: int) -> object:
    return generator(seed).standard_normal((d, DIRECTIONS))
