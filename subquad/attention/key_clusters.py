"""Clusters of keys by content: which keys lie together, and what a cluster tells without being opened."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from subquad.attention.call import AttentionCall
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.loading import backend_of
from subquad.kernels.balanced_tree import balanced_tree
from subquad.kernels.cluster_summaries import cluster_members, spread_of
from subquad.random import generator

DIRECTIONS = 32  # random directions by which the row farthest from the mean is found


class KeyClusters(NamedTuple):
    """C clusters of `size` places each; the keys of a cluster fill its first places."""

    k: Array  # (..., C · d, size), the keys of a cluster as columns, one cluster after the other
    v: Array  # (..., C · size, d_v)
    order: Array | None  # (..., C · size), int32: the place of each key in the sequence, where it is known
    counts: Array  # (..., C), int32: how many places hold a key
    means: Array  # (..., C, d)
    spread: Array  # (..., C, d + bands): how far the keys spread, as `spread_of` tells it
    mean_values: Array  # (..., C, d_v)
    sight: Array | None  # (..., C, d): mean squares of the channels of queries, up to a factor, by which spread is told
    groups: tuple[Array, Array, Array] | None = None  # means, spread and mean values of groups of clusters


def with_groups(xp: ModuleType, found: KeyClusters, group: int, first: int) -> KeyClusters:
    """The clusters, and the summaries of all groups of `group` of them, one after the other, from `first` on.

    Groups that there are already stay as they are. There are none of one cluster.
    """
    have = 0 if found.groups is None else found.groups[0].shape[-2]
    count = max(found.means.shape[-2] - first, 0) // group if group > 1 else 0
    if found.groups is not None and have == count:
        return found
    more = groups_between(xp, found, group, first, have, count)
    if found.groups is not None:
        one, two, three = (xp.concat([x, y], axis=-2) for x, y in zip(found.groups, more, strict=True))
        more = one, two, three
    return found._replace(groups=more)


def groups_between(
    xp: ModuleType, found: KeyClusters, group: int, first: int, begin: int, end: int
) -> tuple[Array, Array, Array]:
    """Means, spread and mean values of the groups begin … end − 1 of clusters from `first` on."""
    own = slice(first + begin * group, first + end * group)

    def split(x: Array) -> Array:
        return xp.reshape(x, (*x.shape[:-2], end - begin, group, x.shape[-1]))

    keys = xp.astype(found.counts[..., own, None], found.means.dtype)
    share = split(keys)
    total = xp.sum(share, axis=-2, keepdims=True)
    share = share / xp.where(total > 0, total, 1.0)
    means, spread, values = (split(x[..., own, :]) for x in (found.means, found.spread, found.mean_values))
    middle, d = xp.sum(share * means, axis=-2, keepdims=True), found.means.shape[-1]
    assert found.sight is not None
    sight = xp.mean(split(found.sight[..., own, :]), axis=-2)  # which no cluster without keys makes 0
    # the u of a cluster stands for its keys, which lie around its mean
    far, twice = xp.concat([means - middle, spread[..., :d]], axis=-2), xp.concat([share, share], axis=-2)
    seen = far * (sight**0.25)[..., None, :]
    spread = spread_of(xp, far, twice, seen, sight, xp.sum(share * spread[..., d:], axis=-2))
    return middle[..., 0, :], spread, xp.sum(share * values, axis=-2)


def find_order(xp: ModuleType, rows: Array, seen: Array | None, size: int, seed: int, implementation: str) -> Array:
    """The numbers of rows (..., n, d) in clusters of `size`, int32 (..., ⌈n / size⌉ · size); hidden ones come last.

    Rows are keys, in the metric of queries where there is one. The order does not depend on other items; it is constant
    for gradients.
    """
    sketch = backend_of(xp).on_host(_directions, rows.shape[-1], seed)
    sketch = xp.asarray(sketch, dtype=rows.dtype, device=place_of(rows))
    rows = backend_of(xp).constant(rows)
    seen = None if seen is None else xp.broadcast_to(seen, rows.shape[:-1])
    return balanced_tree(rows, sketch, size=size, key_mask=seen, implementation=implementation)


def summarize_clusters(
    k: Array, v: Array, order: Array, counts: Array, size: int, spread: Array, sight: Array | None, implementation: str
) -> KeyClusters:
    """The clusters of keys k (..., n, d) and values v for an order (..., C · size) and numbers of keys (..., C)."""
    columns, means = cluster_members(k, order, counts, size=size, turned=True, implementation=implementation)
    members, mean_values = cluster_members(v, order, counts, size=size, implementation=implementation)
    return KeyClusters(columns, members, order, counts, means, spread, mean_values, sight)


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
