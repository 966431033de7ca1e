"""Clusters of keys by content: which keys lie together, and what a cluster tells without being opened."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

from subquad.attention.call import AttentionCall
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.block_loop import BLOCK_ELEMENTS, join_rows
from subquad.core.gather import gather_rows
from subquad.core.loading import backend_of
from subquad.kernels.balanced_tree import balanced_tree
from subquad.random import generator

DIRECTIONS = 32  # random directions by which the row farthest from the mean is found


class KeyClusters(NamedTuple):
    """C clusters of `size` places each; the keys of a cluster fill its first places."""

    k: Array  # (..., C · d, size), the keys of a cluster as columns, one cluster after the other
    v: Array  # (..., C · size, d_v)
    order: Array | None  # (..., C · size), int32: the place of each key in the sequence, where it is known
    counts: Array  # (..., C), int32: how many places hold a key
    means: Array  # (..., C, d)
    spread: Array  # (..., C, d): variance of each channel
    mean_values: Array  # (..., C, d_v)
    groups: tuple[Array, Array, Array] | None = None  # means, spread and mean values of groups of clusters


def with_groups(xp: ModuleType, found: KeyClusters, group: int, first: int) -> KeyClusters:
    """The clusters, and the summaries of all groups of `group` of them, one after the other, from `first` on.

    Groups that there are already stay as they are. There are none of one cluster.
    """
    have = 0 if found.groups is None else found.groups[0].shape[-2]
    count = max(found.means.shape[-2] - first, 0) // group if group > 1 else 0
    if found.groups is not None and have == count:
        return found
    own = slice(first + have * group, first + count * group)

    def split(x: Array) -> Array:
        return xp.reshape(x, (*x.shape[:-2], count - have, group, x.shape[-1]))

    keys = xp.astype(found.counts[..., own, None], found.means.dtype)
    share = split(keys)
    total = xp.sum(share, axis=-2, keepdims=True)
    share = share / xp.where(total > 0, total, 1.0)
    means, spread, values = (split(x[..., own, :]) for x in (found.means, found.spread, found.mean_values))
    middle = xp.sum(share * means, axis=-2, keepdims=True)
    spread = xp.sum(share * (spread + (means - middle) ** 2), axis=-2)
    more = middle[..., 0, :], spread, xp.sum(share * values, axis=-2)
    if found.groups is not None:
        one, two, three = (xp.concat([x, y], axis=-2) for x, y in zip(found.groups, more, strict=True))
        more = one, two, three
    return found._replace(groups=more)


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
    clusters, d, d_v = counts.shape[-1], k.shape[-1], v.shape[-1]
    place = xp.arange(size, dtype=xp.int32, device=place_of(k))

    def summarize(order: Array, counts: Array) -> tuple[Array, ...]:
        flat = xp.reshape(order, (*order.shape[:-2], order.shape[-2] * size))
        holds = (place < counts[..., None])[..., None]  # (..., C, size, 1)
        keys, values = (gather_rows(xp, x, flat) for x in (k, v))
        keys, values = (xp.reshape(x, (*x.shape[:-2], *order.shape[-2:], x.shape[-1])) for x in (keys, values))
        # other places hold what a mask hides: not even a gradient may meet it
        keys, values = (xp.where(holds, x, 0.0) for x in (keys, values))
        share = xp.astype(holds, k.dtype) / xp.astype(xp.where(counts > 0, counts, 1), k.dtype)[..., None, None]

        def mean(x: Array) -> Array:
            return xp.sum(xp.where(holds, x, 0.0) * share, axis=-2)

        means = mean(keys)
        far = keys - means[..., None, :]
        columns = xp.reshape(xp.matrix_transpose(keys), (*keys.shape[:-2], d * size))
        rows = xp.reshape(values, (*values.shape[:-2], size * d_v))
        return columns, rows, means, mean(far * far), mean(values)

    grouped = xp.reshape(order, (*order.shape[:-1], clusters, size))
    at_once = max(1, BLOCK_ELEMENTS // max(1, math.prod(k.shape[:-2]) * size * d))
    if clusters <= at_once or not backend_of(xp).is_concrete(k, v):
        parts = summarize(grouped, counts)
    else:
        ranges = (slice(i, i + at_once) for i in range(0, clusters, at_once))
        parts = join_rows(xp, clusters, (summarize(grouped[..., i, :], counts[..., i]) for i in ranges))
    columns, rows, means, spread, mean_values = parts
    columns = xp.reshape(columns, (*columns.shape[:-2], clusters * d, size))
    rows = xp.reshape(rows, (*rows.shape[:-2], clusters * size, d_v))
    return KeyClusters(columns, rows, order, counts, means, spread, mean_values)


def counts_of(xp: ModuleType, seen: Array, size: int) -> Array:
    """How many of the keys of each cluster are seen, (..., C), int32, for an order that has hidden keys last."""
    clusters = -(-seen.shape[-1] // size)
    total = xp.sum(xp.astype(seen, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
    first = xp.arange(clusters, dtype=xp.int32, device=place_of(seen)) * size
    return xp.clip(total - first, 0, size)


def seen_keys(call: AttentionCall) -> Array:
    """Whether each key is visible, (..., n_kv), of the batch of keys."""
    xp, k = call.xp, call.k
    if call.key_mask is None:
        return xp.ones(k.shape[:-1], dtype=xp.bool, device=place_of(k))
    return xp.broadcast_to(call.key_mask, k.shape[:-1])


def _directions(d: int, seed: int) -> object:
    return generator(seed).standard_normal((d, DIRECTIONS))
