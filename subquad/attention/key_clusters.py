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
from subquad.kernels.clustered_attention import band_sums
from subquad.random import generator

DIRECTIONS = 32  # random directions by which the row farthest from the mean is found
SPREAD_STEPS = 2  # of power iteration, towards the direction in which the keys of a cluster spread most


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
    own = slice(first + have * group, first + count * group)

    def split(x: Array) -> Array:
        return xp.reshape(x, (*x.shape[:-2], count - have, group, x.shape[-1]))

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
    more = middle[..., 0, :], spread, xp.sum(share * values, axis=-2)
    if found.groups is not None:
        one, two, three = (xp.concat([x, y], axis=-2) for x, y in zip(found.groups, more, strict=True))
        more = one, two, three
    return found._replace(groups=more)


def spread_of(xp: ModuleType, far: Array, share: Array, seen: Array, sight: Array, rest: Array | None = None) -> Array:
    """What is told of the covariance Σ share · far farᵀ of rows `far` (..., rows, d) with `share` (..., rows, 1).

    u (d), with u uᵀ along the direction in which they spread most as queries see it, and for each band the mean of the
    variance of its channels that is left, with `rest` (..., bands) added: (..., d + bands). `seen` (..., rows, d) are
    the same rows in the metric of the queries, and `sight` (..., d) the mean squares of their channels, by which
    channels are weighed: what no query looks at does not count.
    """
    size = backend_of(xp).constant(xp.max(xp.abs(seen), axis=(-2, -1), keepdims=True))
    x = seen / xp.where(size > 0, size, 1.0)
    square, weighted = xp.sum(x * x, axis=-1, keepdims=True), x * share
    direction = xp.take_along_axis(x, xp.argmax(square, axis=-2, keepdims=True), axis=-2)
    for _ in range(SPREAD_STEPS):
        direction = direction / _length(xp, direction)
        direction = xp.sum(xp.sum(x * direction, axis=-1, keepdims=True) * weighted, axis=-2, keepdims=True)
    along = xp.sum(x * (direction / _length(xp, direction)), axis=-1, keepdims=True)
    # Σ g / √(gᵀ Σ g) for along = far g: what is left of the covariance has no negative variance, whatever g is
    total = xp.sum(share * along * along, axis=-2, keepdims=True)
    some = total > 0
    root = xp.where(some, xp.where(some, total, 1.0) ** -0.5, 0.0)
    u = (xp.sum(share * along * far, axis=-2, keepdims=True) * root)[..., 0, :]
    left = band_sums(xp, (xp.sum(share * far * far, axis=-2) - u * u) * sight) / band_sums(xp, sight)
    return xp.concat([u, left if rest is None else left + rest], axis=-1)


def mean_squares_of(xp: ModuleType, metric: Array) -> Array:
    """The mean squares (..., d) of the channels of queries by their metric Σ^¼ (..., d, d), up to a factor."""
    root = metric @ metric
    return xp.sum(root * root, axis=-1)


def _length(xp: ModuleType, x: Array) -> Array:
    """The length of rows (..., d), as (..., 1); 1 of a row of 0."""
    square = xp.sum(x * x, axis=-1, keepdims=True)
    return xp.where(square > 0, square, 1.0) ** 0.5


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
    xp: ModuleType, k: Array, v: Array, order: Array, counts: Array, size: int, as_seen: tuple[Array, Array] | None
) -> KeyClusters:
    """The clusters of keys k (..., n, d) and values v for an order (..., C · size) and numbers of keys (..., C).

    `as_seen` are the keys in the metric of the queries, and the `sight` (..., C, d). Without it, the spread of a
    cluster is the variance of each channel.
    """
    rows, sight = (None, None) if as_seen is None else as_seen
    clusters, d, d_v = counts.shape[-1], k.shape[-1], v.shape[-1]
    place = xp.arange(size, dtype=xp.int32, device=place_of(k))

    def summarize(order: Array, counts: Array, sight: Array | None) -> tuple[Array, ...]:
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
        far = xp.where(holds, keys - means[..., None, :], 0.0)
        columns = xp.reshape(xp.matrix_transpose(keys), (*keys.shape[:-2], d * size))
        lines = xp.reshape(values, (*values.shape[:-2], size * d_v))
        if rows is None or sight is None:
            spread = mean(far * far)
        else:
            seen = xp.reshape(gather_rows(xp, rows, flat), keys.shape)
            seen = xp.where(holds, seen, 0.0)
            seen = xp.where(holds, seen - mean(seen)[..., None, :], 0.0)
            spread = spread_of(xp, far, share, seen, sight)
        return columns, lines, means, spread, mean(values)

    grouped = xp.reshape(order, (*order.shape[:-1], clusters, size))
    at_once = max(1, BLOCK_ELEMENTS // max(1, math.prod(k.shape[:-2]) * size * d))
    if clusters <= at_once or not backend_of(xp).is_concrete(k, v):
        parts = summarize(grouped, counts, sight)
    else:
        ranges = (slice(i, i + at_once) for i in range(0, clusters, at_once))
        own = ((i, None if sight is None else sight[..., i, :]) for i in ranges)
        parts = join_rows(xp, clusters, (summarize(grouped[..., i, :], counts[..., i], x) for i, x in own))
    columns, lines, means, spread, mean_values = parts
    columns = xp.reshape(columns, (*columns.shape[:-2], clusters * d, size))
    lines = xp.reshape(lines, (*lines.shape[:-2], clusters * size, d_v))
    return KeyClusters(columns, lines, order, counts, means, spread, mean_values, sight)


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
