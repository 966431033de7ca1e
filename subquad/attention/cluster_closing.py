"""Keys of clustered attention are put into clusters: those of chunks that are full, or all keys at once."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from subquad.attention.call import AttentionCall
from subquad.attention.key_clusters import KeyClusters, counts_of, find_order, seen_keys, summarize_clusters
from subquad.attention.query_metric import (
    ChunkMetrics,
    counted_rows,
    in_metric,
    mean_squares_of,
    pooled,
    query_metric,
    raised,
    second_moment,
)
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.kernels.cluster_summaries import cluster_spread

if TYPE_CHECKING:
    from subquad.attention.clustered import Clustered


def close_chunks(method: Clustered, call: AttentionCall, metrics: ChunkMetrics, *, begins: bool) -> KeyClusters:
    """The clusters of the first chunks of the keys, each in its metric.

    Before them are those of the sinks, if the keys are the first of the sequence.
    """
    xp, chunk, chunks = call.xp, method.chunk, metrics.chunks
    k, v = (x[..., : chunks * chunk, :] for x in (call.k, call.v))
    seen = seen_keys(call)[..., : chunks * chunk]
    sinks = method.sinks if begins else 0
    clustered = seen & (xp.arange(chunks * chunk, device=place_of(k)) >= sinks)
    rows = metrics.apply(xp, xp.reshape(k, (*k.shape[:-2], chunks, chunk, k.shape[-1])), method.power)
    held = xp.reshape(clustered, (*clustered.shape[:-1], chunks, chunk))
    order = find_order(xp, rows, held, method.cluster_size, method.seed, method.implementation)
    order = order + xp.arange(chunks, dtype=xp.int32, device=place_of(k))[:, None] * chunk
    counts = counts_of(xp, held, method.cluster_size)
    order, counts = (xp.reshape(x, (*x.shape[:-2], chunks * x.shape[-1])) for x in (order, counts))
    of_chunks = metrics.mean_squares(xp)[..., None, :]
    sight = xp.broadcast_to(of_chunks, (*of_chunks.shape[:-2], method.clusters_of_chunk, k.shape[-1]))
    sight = xp.reshape(sight, (*sight.shape[:-3], chunks * method.clusters_of_chunk, k.shape[-1]))
    rows = xp.reshape(rows, (*rows.shape[:-3], chunks * chunk, k.shape[-1]))
    order, counts, spread, sight = _described(method, xp, k, rows, seen, sinks, order, counts, sight)
    del rows  # as large as the keys, which are copied next
    return summarize_clusters(k, v, order, counts, method.cluster_size, spread, sight, method.implementation)


def close_keys(
    method: Clustered, xp: ModuleType, k: Array, v: Array, seen: Array, metric: Array, *, begins: bool
) -> KeyClusters:
    """The clusters of these keys in one metric; those of the sinks are before them, if they begin the sequence."""
    size, n = method.cluster_size, k.shape[-2]
    sinks = min(method.sinks, n) if begins else 0
    clustered = seen & (xp.arange(n, device=place_of(k)) >= sinks)
    rows = in_metric(xp, k, raised(xp, metric, method.power))
    order = find_order(xp, rows, clustered, size, method.seed, method.implementation)
    counts, sight = counts_of(xp, clustered, size), mean_squares_of(xp, metric)[..., None, :]
    sight = xp.broadcast_to(sight, (*sight.shape[:-2], counts.shape[-1], k.shape[-1]))
    order, counts, spread, sight = _described(method, xp, k, rows, seen, sinks, order, counts, sight)
    del rows  # as large as the keys, which are copied next
    return summarize_clusters(k, v, order, counts, size, spread, sight, method.implementation)


def close_all(method: Clustered, call: AttentionCall) -> tuple[KeyClusters, Array]:
    """The clusters of all keys of a call, and the cluster of each key, −1 for none."""
    xp, k, size, n = call.xp, call.k, method.cluster_size, call.k.shape[-2]
    seen, sinks = seen_keys(call), min(method.sinks, n)
    metric = query_metric(xp, pooled(xp, second_moment(xp, call.q, counted_rows(call)), k))
    found = close_keys(method, xp, k, call.v, seen, metric, begins=True)
    assert found.order is not None
    first = -(-sinks // size)
    cluster_of = xp.astype(xp.argsort(found.order[..., first * size :][..., :n], axis=-1), xp.int32) // size + first
    clustered = seen & (xp.arange(n, device=place_of(k)) >= sinks)
    return found, xp.where(clustered, cluster_of, -1)


def _described(
    method: Clustered, xp: ModuleType, k: Array, rows: Array, seen: Array, sinks: int, order: Array, counts: Array,
    sight: Array,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Order, counts, spread and sight of clusters, with those of the sinks before them.

    `rows` are the keys in the metric of the queries.
    """
    size = method.cluster_size
    if sinks:
        own, where = seen[..., :sinks], place_of(order)
        first = xp.astype(xp.argsort(xp.astype(~own, xp.int32), axis=-1, stable=True), xp.int32)
        lacking = -sinks % size
        if lacking:
            first = xp.concat([first, xp.zeros((*own.shape[:-1], lacking), dtype=xp.int32, device=where)], axis=-1)
        order, counts = (
            xp.concat([xp.broadcast_to(x, (*y.shape[:-1], x.shape[-1])), y], axis=-1)
            for x, y in ((first, order), (counts_of(xp, own, size), counts))
        )
        lacking = counts.shape[-1] - sight.shape[-2]
        before = xp.broadcast_to(sight[..., :1, :], (*sight.shape[:-2], lacking, sight.shape[-1]))
        sight = xp.concat([before, sight], axis=-2)
    spread = cluster_spread(k, rows, order, counts, sight, size=size, implementation=method.implementation)
    return order, counts, spread, sight
