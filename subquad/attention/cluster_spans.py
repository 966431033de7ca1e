"""Clusters of causal calls, made again of longer spans of keys.

Keys of a chunk are clustered when it is full. When `spans` chunks are full, all their keys are clustered again,
together, and so are those of `spans`² chunks, `spans`³, …: among more keys, a cluster finds members that are more
alike. A row reads the clusters that there are when its own chunk begins, so no later token changes an earlier row. A
key is clustered 1 + log(n / chunk) / log(spans) times; there are as many clusters as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from subquad.attention.key_clusters import KeyClusters, counts_of, find_order, mean_squares_of, summarize_clusters
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.loading import backend_of

if TYPE_CHECKING:
    from subquad.attention.clustered import Clustered


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


def stretches(method: Clustered, xp: ModuleType, found: KeyClusters, metrics: Array, before: int) -> Iterator[Stretch]:
    """Rows that read the same clusters, in order, and these; the last one has the clusters that remain.

    `found` has all clusters, the last of them of the chunks of the call, which have the `metrics` (..., chunks, d, d),
    each by itself. `before` is the number of full chunks before them. What was handed out may change with the next one,
    and so may `found`.
    """
    first, chunks = 0, metrics.shape[-3]
    base = found.means.shape[-2] - chunks * method.clusters_of_chunk
    for chunk in range(1, chunks + 1):
        span = span_of(before + chunk, method.spans)
        if span:
            yield Stretch(first, chunk, found)
            stop = base + chunk * method.clusters_of_chunk
            start = stop - span * method.clusters_of_chunk
            # no name for what is put in the place of others: it would live on while rows are read
            metric = metrics[..., chunk - 1, :, :]
            found = _replaced(xp, method, found, start, _clustered_again(method, xp, found, slice(start, stop), metric))
            first = chunk
    yield Stretch(first, chunks + 1, found)


def _clustered_again(method: Clustered, xp: ModuleType, found: KeyClusters, these: slice, metric: Array) -> KeyClusters:
    """As many clusters of the keys of these ones."""
    size, count = method.cluster_size, these.stop - these.start
    counts, d = found.counts[..., these], found.means.shape[-1]
    columns = found.k[..., these.start * d : these.stop * d, :]
    columns = xp.reshape(columns, (*columns.shape[:-2], count, d, size))
    k = xp.reshape(xp.matrix_transpose(columns), (*columns.shape[:-3], count * size, d))
    v = found.v[..., these.start * size : these.stop * size, :]
    holds = xp.arange(size, dtype=xp.int32, device=place_of(k)) < counts[..., None]
    holds = xp.reshape(holds, (*counts.shape[:-1], count * size))
    rows = k @ metric
    order = find_order(xp, rows, holds, size, method.seed, method.implementation)
    sight = xp.broadcast_to(mean_squares_of(xp, metric)[..., None, :], found.means[..., these, :].shape)
    return summarize_clusters(xp, k, v, order, counts_of(xp, holds, size), size, (rows, sight))


def _replaced(xp: ModuleType, method: Clustered, found: KeyClusters, start: int, new: KeyClusters) -> KeyClusters:
    """The clusters with new ones in the place of some, from number `start` on; written into them if that can be."""
    size, d = method.cluster_size, found.means.shape[-1]

    def replaced(x: Array, y: Array, factor: int = 1) -> Array:
        a, b = start * factor, start * factor + y.shape[-2]
        if backend_of(xp).fills_in_place:
            x[..., a:b, :] = y
            return x
        return xp.concat([x[..., :a, :], y, x[..., b:, :]], axis=-2)

    kept = None
    if found.groups is not None:
        whole = max(start - method.clusters_of_sinks, 0) // method.group
        one, two, three = (x[..., :whole, :] for x in found.groups)
        kept = one, two, three
    assert found.sight is not None
    assert new.sight is not None
    return KeyClusters(
        replaced(found.k, new.k, d), replaced(found.v, new.v, size), None,
        replaced(found.counts[..., None], new.counts[..., None])[..., 0], replaced(found.means, new.means),
        replaced(found.spread, new.spread), replaced(found.mean_values, new.mean_values),
        replaced(found.sight, new.sight), kept,
    )  # fmt: skip
