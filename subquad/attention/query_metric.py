"""The metric in which queries tell keys apart: Σ^¼, with Σ the second moment of the queries.

The mean of (q·(k − μ))² over queries is the squared length of (k − μ) Σ^½; the quarter power is between that and the
plain length. Other powers are made of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

from subquad.attention.call import AttentionCall
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.decompositions import decomposition
from subquad.core.dtypes import HALF_ELEMENTS, compute_dtype
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch

POWER = 0.25
SMALLEST = 1e-6  # least eigenvalue of Σ, as a fraction of the largest


class ChunkMetrics(NamedTuple):
    """The metrics of the chunks of a call, in order, each of which some chunks have in common."""

    metrics: Array  # (..., metrics, d, d)
    chunks_of: tuple[int, ...]  # that have each of them

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return sum(self.chunks_of)

    def of(self, chunk: int) -> Array:
        """The metric (..., d, d) of a chunk."""
        each = (i for i, count in enumerate(self.chunks_of) for _ in range(count))
        return self.metrics[..., next(itertools.islice(each, chunk, None)), :, :]

    def apply(self, xp: ModuleType, k: Array, power: float) -> Array:
        """The rows of keys (..., chunks, chunk, d), times the power of the Σ of their chunk."""
        first, parts, metrics = 0, [], raised(xp, self.metrics, power)
        for i, count in enumerate(self.chunks_of):
            parts.append(in_metric(xp, k[..., first : first + count, :, :], metrics[..., i : i + 1, :, :]))
            first += count
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-3)

    def mean_squares(self, xp: ModuleType) -> Array:
        """The mean squares (..., chunks, d) of the channels of queries by the metrics, up to a factor."""
        # not `take`: XLA fails on sums of squares of products of what it has gathered so, and ends the process
        squares = mean_squares_of(xp, self.metrics)
        parts = [squares[..., i : i + 1, :] for i in range(len(self.chunks_of))]
        shapes = [(*x.shape[:-2], count, x.shape[-1]) for x, count in zip(parts, self.chunks_of, strict=True)]
        return xp.concat([xp.broadcast_to(x, shape) for x, shape in zip(parts, shapes, strict=True)], axis=-2)


def mean_squares_of(xp: ModuleType, metric: Array) -> Array:
    """The mean squares (..., d) of the channels of queries by their metric Σ^¼ (..., d, d), up to a factor."""
    root = metric @ metric
    return xp.sum(root * root, axis=-1)


def raised(xp: ModuleType, metric: Array, power: float) -> Array:
    """The matrices Σ^power (..., d, d) of metrics Σ^¼ (..., d, d), up to a factor."""
    if power == POWER:
        return metric
    values, vectors = decomposition(xp, "eigh", metric, "take another method than clustered")(metric)
    root = xp.where(values > 0, values, 0.0) ** (power / POWER)
    return (vectors * root[..., None, :]) @ xp.matrix_transpose(vectors)


def query_metric(xp: ModuleType, moment: Array) -> Array:
    """The matrix Σ^¼ (..., d, d) of moments Σ (..., d, d), up to a factor; the identity where Σ is 0 or not finite.

    It is constant for gradients.
    """
    moment = backend_of(xp).constant(moment)
    d = moment.shape[-1]
    identity = xp.eye(d, dtype=moment.dtype, device=place_of(moment))
    trace = xp.sum(moment * identity, axis=(-2, -1), keepdims=True)
    finite = xp.isfinite(trace) & xp.all(xp.isfinite(moment), axis=(-2, -1), keepdims=True)
    usable = (trace > 0) & finite
    moment = xp.where(usable, moment / xp.where(usable, trace, 1.0), identity / d)
    values, vectors = decomposition(xp, "eigh", moment, "take another method than clustered")(moment)
    least = SMALLEST * values[..., -1:]
    root = xp.where(values > least, values, least) ** POWER
    return (vectors * root[..., None, :]) @ xp.matrix_transpose(vectors)


def second_moment(xp: ModuleType, q: Array, counted: Array | None) -> Array:
    """Σ q qᵀ (..., d, d) over the rows of q that are finite and `counted` (..., n); constant for gradients."""
    q, dtype = backend_of(xp).constant(q), compute_dtype(xp, q)
    if q.dtype == dtype:
        return _moment_of(xp, q, counted)
    d = q.shape[-1]
    if counted is not None:  # a mask may have more items than the queries, and an item of its own for each
        batch = broadcast_batch(q=q.shape[:-2], key_mask=counted.shape[:-1])
        q, counted = xp.broadcast_to(q, (*batch, *q.shape[-2:])), xp.broadcast_to(counted, (*batch, q.shape[-2]))
        counted = xp.reshape(counted, (math.prod(batch), q.shape[-2]))
    if 0 in q.shape:  # no queries: those of early chunks, where there are fewer than keys
        return xp.zeros((*q.shape[:-2], d, d), dtype=dtype, device=place_of(q))
    parts = [_moment_of(xp, rows, None if counted is None else counted[i]) for i, rows in _in_parts(xp, q, dtype)]
    return xp.reshape(xp.concat(parts, axis=0), (*q.shape[:-2], d, d))


def in_metric(xp: ModuleType, k: Array, metric: Array) -> Array:
    """The rows of keys (..., n, d) in a metric (..., d, d), in its dtype: k may have half precision beside float32."""
    if k.dtype == metric.dtype:
        return k @ metric
    d = k.shape[-1]
    metrics = xp.reshape(xp.broadcast_to(metric, (*k.shape[:-2], d, d)), (math.prod(k.shape[:-2]), d, d))
    found = xp.empty((metrics.shape[0], *k.shape[-2:]), dtype=metric.dtype, device=place_of(k))
    for i, rows in _in_parts(xp, k, metric.dtype):
        found[i] = rows @ metrics[i]
    return xp.reshape(found, k.shape)


def _in_parts(xp: ModuleType, x: Array, dtype: Any) -> Iterator[tuple[slice, Array]]:
    """Items of x (..., n, d) in this dtype, a few at a time, and which these are of all."""
    items = xp.reshape(x, (math.prod(x.shape[:-2]), *x.shape[-2:]))
    count = max(1, HALF_ELEMENTS // math.prod(x.shape[-2:]))
    for first in range(0, items.shape[0], count):
        some = slice(first, first + count)
        yield some, xp.astype(items[some], dtype)


def _moment_of(xp: ModuleType, q: Array, counted: Array | None) -> Array:
    if counted is None and backend_of(xp).is_concrete(q):
        found = xp.matrix_transpose(q) @ q
        if bool(xp.all(xp.isfinite(found))):  # then so are all rows
            return found
    rows = xp.all(xp.isfinite(q), axis=-1, keepdims=True)
    rows = rows if counted is None else rows & counted[..., None]
    q = xp.where(rows, q, 0.0)
    return xp.matrix_transpose(q) @ q


def with_own_keys(call: AttentionCall) -> AttentionCall:
    """The call with keys that no two items share, apart from heads (axis −3): clusters depend on the queries."""
    xp, k, mask = call.xp, call.k, call.key_mask
    of_mask = () if mask is None else mask.shape[:-1]
    batch = broadcast_batch(q=call.q.shape[:-2], k=k.shape[:-2], mask=of_mask)
    if batch:
        batch = (*batch[:-1], *(broadcast_batch(k=k.shape[-3:-2], mask=of_mask[-1:]) or (1,)))
    return call.with_keys(xp.broadcast_to(k, (*batch, *k.shape[-2:])), call.v, mask)


def counted_rows(call: AttentionCall) -> Array | None:
    """The mask (..., n) of the rows that have a key at their place and count as it does; None if all count."""
    return call.key_mask if call.q.shape[-2] == call.k.shape[-2] else None


def pooled(xp: ModuleType, moment: Array, k: Array) -> Array:
    """Moments (..., d, d) of queries added up over the heads (axis −3) that share keys k."""
    if moment.ndim > 2 and moment.shape[-3] > 1 and k.shape[-3:-2] in ((), (1,)):
        return xp.sum(moment, axis=-3, keepdims=True)
    return moment


def is_renewed(chunk: int) -> bool:
    """Whether a chunk has a metric of its own, or that of the chunk before: its queries would add a third at most."""
    return chunk < 4 or chunk % 2 ** (chunk.bit_length() - 2) == 0


def metrics_of_chunks(call: AttentionCall, chunks: int, size: int) -> ChunkMetrics:
    """The metrics of the first chunks of `size` keys: of the queries up to the end of a chunk."""
    xp, n, ahead = call.xp, call.q.shape[-2], call.k.shape[-2] - call.q.shape[-2]
    moments: list[Array] = []
    chunks_of: list[int] = []  # that have the metric of each of the moments
    first, counted = 0, counted_rows(call)
    for c in range(chunks):
        if is_renewed(c):
            last = min(max((c + 1) * size - ahead, first), n)
            own = None if counted is None else counted[..., first:last]
            part = second_moment(xp, call.q[..., first:last, :], own)
            moments.append(moments[-1] + part if moments else part)
            chunks_of.append(0)
            first = last
        chunks_of[-1] += 1
    metrics = query_metric(xp, xp.stack([pooled(xp, x, call.k) for x in moments], axis=-3))
    return ChunkMetrics(metrics, tuple(chunks_of))
