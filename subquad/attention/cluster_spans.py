"""Clusters of causal calls, made again of longer spans of keys.

Keys of a chunk are clustered when it is full. When `spans` chunks are full, all their keys are clustered again,
together, and so are those of `spans`² chunks, `spans`³, …: among more keys, a cluster finds members that are more
alike. A row reads the clusters that there are when its own chunk begins, so no later token changes an earlier row. A
key is clustered 1 + log(n / chunk) / log(spans) times; there are as many clusters as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from subquad.attention.key_clusters import KeyClusters, counts_of, find_order, groups_between
from subquad.attention.query_metric import ChunkMetrics, mean_squares_of, raised
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.kernels.cluster_summaries import cluster_members, cluster_spread

if TYPE_CHECKING:
    from subquad.attention.clustered import Clustered


AT_ONCE = 2**20  # numbers of the keys that are clustered again at once, if there are several items


class Stretch(NamedTuple):
    """The clusters of rows before which first, first + 1, …, last − 1 of the chunks of a call are full."""

    first: int
    last: int
    clusters: KeyClusters


def span_of(chunk: int, factor: int) -> int:
    """How many chunks, the last of which is number `chunk` from 1 on, are clustered again when it is full; 0: none."""
    span = 1
    while factor > 1 and chunk % (span * factor) == 0:
        span *= factor
    return span if span > 1 else 0


def stretches(
    method: Clustered, xp: ModuleType, found: KeyClusters, metrics: ChunkMetrics, before: int, fills: bool
) -> Iterator[Stretch]:
    """Rows that read the same clusters, in order, and these; the last one has the clusters that remain.

    `found` has all clusters, the last of them of the chunks of the call, which have the `metrics`, each by itself.
    `before` is the number of full chunks before them. With `fills`, what was handed out may change with the next
    one, and so may `found`.
    """

    def grouped(found: KeyClusters) -> KeyClusters:
        wanted = method.expanded is not None or found.groups is not None
        return method.grouped(xp, found) if wanted else found

    first, chunks = 0, metrics.chunks
    base = found.means.shape[-2] - chunks * method.clusters_of_chunk
    for chunk in range(1, chunks + 1):
        span = span_of(before + chunk, method.spans)
        if span:
            found = grouped(found)
            yield Stretch(first, chunk, found)
            stop = base + chunk * method.clusters_of_chunk
            start = stop - span * method.clusters_of_chunk
            found = _clustered_again(method, xp, found, slice(start, stop), metrics.of(chunk - 1), fills)
            first = chunk
    yield Stretch(first, chunks + 1, grouped(found))


def _clustered_again(
    method: Clustered, xp: ModuleType, found: KeyClusters, these: slice, metric: Array, fills: bool
) -> KeyClusters:
    """The clusters, with as many others of the keys of these ones in their place; if `fills`, written into them."""
    some = _items_at_once(found, (these.stop - these.start) * method.cluster_size, metric) if fills else []
    for i in some:
        arrays: Any = found._replace(order=None, groups=None)
        part = KeyClusters(*(None if x is None else x[i] for x in arrays))
        _put_others(method, xp, part, these, metric[i], fills)
    if not some:
        found = _put_others(method, xp, found, these, metric, fills)
    groups = found.groups
    if groups is not None:
        begin = max(these.start - method.clusters_of_sinks, 0) // method.group
        end = min(-(-(these.stop - method.clusters_of_sinks) // method.group), groups[0].shape[-2])
        if begin < end:
            again = groups_between(xp, found, method.group, method.clusters_of_sinks, begin, end)
            one, two, three = (_put(xp, x, y, begin, end, fills) for x, y in zip(groups, again, strict=True))
            groups = one, two, three
    return found._replace(order=None, groups=groups)


def _put(xp: ModuleType, x: Array, y: Array, begin: int, end: int, fills: bool) -> Array:
    """Array x with y in the rows begin … end − 1; if `fills`, written into x."""
    if fills:
        x[..., begin:end, :] = y
        return x
    return xp.concat([x[..., :begin, :], y, x[..., end:, :]], axis=-2)


def _items_at_once(found: KeyClusters, keys: int, metric: Array) -> list[tuple[slice, ...]]:
    """The parts of a batch, so many keys in each item, that are clustered again at once; none if all are.

    Parts are of the last axis with several items, so that what is written into one is written into the whole.
    """
    arrays = [found.k, found.v, found.means, found.spread, found.mean_values, found.sight, metric]
    batches = {x.shape[:-2] for x in arrays} | {found.counts.shape[:-1]}
    batch = max(batches, key=len)
    axis = max((i for i, count in enumerate(batch) if count > 1), default=-1)
    if len(batches) > 1 or axis < 0:
        return []
    at_once = max(1, AT_ONCE * batch[axis] // (math.prod(batch) * keys * metric.shape[-1]))
    before = (slice(None),) * axis
    return [(*before, slice(i, i + at_once)) for i in range(0, batch[axis], at_once)] if at_once < batch[axis] else []


def _put_others(
    method: Clustered, xp: ModuleType, found: KeyClusters, these: slice, metric: Array, fills: bool
) -> KeyClusters:
    """The clusters with others, found by the metric, in the place of these; few copies of the keys live at once."""
    size, count, d = method.cluster_size, these.stop - these.start, found.means.shape[-1]

    def put(x: Array, y: Array, factor: int = 1) -> Array:
        return _put(xp, x, y, these.start * factor, these.stop * factor, fills)

    def keys() -> Array:
        columns = found.k[..., these.start * d : these.stop * d, :]
        columns = xp.reshape(columns, (*columns.shape[:-2], count, d, size))
        return xp.reshape(xp.matrix_transpose(columns), (*columns.shape[:-3], count * size, d))

    counts = found.counts[..., these]
    holds = xp.arange(size, dtype=xp.int32, device=place_of(counts)) < counts[..., None]
    holds = xp.reshape(holds, (*counts.shape[:-1], count * size))
    rows = keys() @ raised(xp, metric, method.power)
    order = find_order(xp, rows, holds, size, method.seed, method.implementation)
    k, counts = keys(), counts_of(xp, holds, size)
    sight = xp.broadcast_to(mean_squares_of(xp, metric)[..., None, :], found.means[..., these, :].shape)
    assert found.sight is not None
    found = found._replace(
        counts=put(found.counts[..., None], counts[..., None])[..., 0],
        spread=put(
            found.spread, cluster_spread(k, rows, order, counts, sight, size=size, implementation=method.implementation)
        ),
        sight=put(found.sight, sight),
    )
    del rows
    columns, means = cluster_members(k, order, counts, size=size, turned=True, implementation=method.implementation)
    found = found._replace(k=put(found.k, columns, d), means=put(found.means, means))
    del k, columns
    v = found.v[..., these.start * size : these.stop * size, :]
    v, mean_values = cluster_members(v, order, counts, size=size, implementation=method.implementation)
    return found._replace(v=put(found.v, v, size), mean_values=put(found.mean_values, mean_values))
