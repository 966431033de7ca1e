"""Attention to clusters of keys: near keys and a few opened clusters exactly, all other clusters by their centroids.

    out = softmax over [ s q·k of near keys and of keys of opened clusters;  w of the other clusters ] · [ v;  v̄ ]

Clusters are made by content, so that a row finds the keys that matter to it wherever they lie. O(n² / cluster_size)
time with a small constant, O(n) memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from subquad.attention.call import AttentionCall, enter
from subquad.attention.key_clusters import KeyClusters, counts_of, find_order, query_metric, summarize_clusters
from subquad.attention.method import Method
from subquad.attention.restrictions import NONE
from subquad.attention.window import SIZE, near_blocks
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_count, check_seed
from subquad.core.shapes import broadcast_batch
from subquad.kernels.block_attention import block_attention
from subquad.kernels.clustered_attention import clustered_attention
from subquad.kernels.visibility import plain_sight
from subquad.registry import register

THREADS_BYTES = 2**24  # scratch of compiled kernels


class Far(NamedTuple):
    """The clusters of a call, and the cluster of each key, where rows may have some of them near."""

    clusters: KeyClusters
    cluster_of: Array | None


@register(
    "clustered",
    cost="n (chunk + opened cluster_size + n / cluster_size) (d + d_v)",
    size="opened",
    defaults=({"opened": 4}, {"opened": 16}),
)
@dataclass(frozen=True, repr=False, eq=False)
class Clustered(Method):
    """Attention to keys clustered by content: a treecode for softmax.

    Parameters
    ----------
    cluster_size : int, default 16
        Keys of a cluster.
    opened : int, default 16
        Clusters whose keys a query reads one by one; it reads the others as one centroid each.
    chunk : int, default 256
        In causal calls, keys are clustered in chunks of this many. A query reads its own chunk exactly, and clusters of
        the chunks before.
    sinks : int, default 4
        The first keys of the sequence that every query reads exactly, at most `chunk`.
    window : int, default 8
        In calls that are not causal, how many keys before and after its own place a query reads exactly.
    seed : int, default 0
        Seed of the random directions by which the row farthest from the mean of a set is found.
    implementation : str, default "auto"
        "auto" takes the first override of the library's backend that accepts the call, "generic" the form in plain
        Array API. The name of an override forces that override: ValueError, with the reasons, if it cannot take a call.

    Notes
    -----
    A cluster of n keys with mean μ, variances σ² and mean value v̄ that stays closed has the weight exp(w) and the value
    v̄, with

        w = s q·μ + s² Σ_l q_l² σ²_l / 4 + log n.

    The clusters of the largest w are opened. All weights are positive and there is one softmax over all of them, so an
    output is a convex combination of values; with every cluster opened it is exact attention. A key counts once: those
    read exactly because they are near are left out of their cluster.

    Clusters come from splitting rows k Σ^¼ in halves of equal size, with Σ the second moment of the queries (of all
    heads that share the keys, without queries at places that `key_mask` hides). In causal calls, Σ of a chunk sums up
    the queries up to its end, or up to the end of an earlier chunk, at least ¾ of them, so that no later token changes an
    earlier row. Which keys lie together and which clusters are opened is constant for gradients. The place of query i is
    i + n_kv − n. Kernels: `balanced_tree`, `block_attention`, `clustered_attention`.

    References
    ----------
    .. [1] A. Vyas et al., "Fast Transformers with Clustered Attention", 2020: centroids, of queries.
    .. [2] Z. Zeng et al., "Multi Resolution Analysis (MRA) for Approximate Self-Attention", 2022: coarse blocks beside
       fine ones, by position.
    .. [3] Y. Chen et al., "RetroInfer", 2025: clusters of keys that are retrieved, or estimated, in decoding.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 8))
    >>> every = subquad.attention(q, k, v, "clustered", opened=7)  # of ⌈100 / 16⌉ clusters
    >>> bool(np.allclose(every, subquad.attention(q, k, v, "exact")))
    True
    """

    restrictions = frozenset({"segments", "return_lse"})
    reads = frozenset({"return_lse"})

    cluster_size: int = 16
    opened: int = 16
    chunk: int = 256
    sinks: int = 4
    window: int = 8
    seed: int = 0
    implementation: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("cluster_size", 1), ("opened", 0), ("chunk", 1), ("sinks", 0), ("window", 0)):
            check_count(name, getattr(self, name), least=least)
        check_seed(self.seed)
        if self.sinks > self.chunk:
            msg = f"sinks={self.sinks} are more keys than a chunk has, {self.chunk}; pass a larger chunk or fewer sinks"
            raise ValueError(msg)

    def _evaluate(self, call: AttentionCall) -> Array:
        return self._evaluate_with_lse(call.restricted(NONE))[0]

    def _evaluate_with_lse(self, call: AttentionCall) -> tuple[Array, Array]:
        if call.q.shape[-2] == 0 or call.k.shape[-2] == 0:
            place, start, stop = plain_sight(call.xp, call.q, call.q.shape[-2], call.k.shape[-2])
            nothing = call.q, call.k, call.v, start, stop, *[None] * 7
            return block_attention(*nothing, scale=call.scale, size=1, key_mask=call.key_mask)
        place, start, stop, sides = self._near(call)
        near = self._read_near(call, call.q, start, stop, near_blocks(call, *sides))
        if call.causal and call.k.shape[-2] <= self.chunk:
            return near
        return self._read_far(call, call.q, place, self._far(call), near, self.opened)

    def on_rows(
        self, q: Array, k: Array, v: Array, rows: Array, /, *, causal: bool, key_mask: Array | None, scale: float,
        opened: tuple[int, ...],
    ) -> Array:  # fmt: skip
        """Return the output at some rows for several numbers of opened clusters; clusters are made once.

        Parameters
        ----------
        q, k, v : array, shape (..., n, d), (..., n_kv, d) and (..., n_kv, d_v)
            Arrays as `subquad.attention` takes them.
        rows : array of int, shape (r,)
            Numbers of queries.
        causal, key_mask, scale
            As in `subquad.attention`.
        opened : tuple of int
            Numbers of clusters to open.

        Returns
        -------
        array, shape (..., len(opened), r, d_v)
            The outputs, in the compute dtype.
        """
        call = enter(None, {"q": q, "k": k, "v": v}, key_mask=key_mask, causal=causal, scale=scale)
        xp = call.xp
        place, start, stop, _ = self._near(call)
        place, start, stop = (xp.take(x, rows, axis=-1) for x in (place, start, stop))
        some = xp.take(call.q, rows, axis=-2)
        near = self._read_near(call, some, start, stop, None)
        if call.causal and call.k.shape[-2] <= self.chunk:
            found = [near[0]] * len(opened)
        else:
            far = self._far(call)
            found = [self._read_far(call, some, place, far, near, count)[0] for count in opened]
        heads = call.arrangement.heads
        return xp.stack([heads.unfold(out) for out in found], axis=-3)

    def _near(self, call: AttentionCall) -> tuple[Array, Array, Array, tuple[int, int]]:
        """The place of each row, the first and the last but one place of the keys near it, and how far these lie."""
        xp = call.xp
        place, _, _ = plain_sight(xp, call.q, call.q.shape[-2], call.k.shape[-2])
        if call.causal:
            start = xp.maximum(place, xp.zeros_like(place)) // self.chunk * self.chunk
            return place, start, place + 1, (self.chunk - 1, 0)
        return place, place - self.window, place + self.window + 1, (self.window, self.window)

    def _read_near(
        self, call: AttentionCall, q: Array, start: Array, stop: Array, blocks: Array | None
    ) -> tuple[Array, Array]:
        """(out, lse) over the keys near each row."""
        return block_attention(
            q, call.k, call.v, start, stop, blocks, *[None] * 6, scale=call.scale, size=SIZE, key_mask=call.key_mask,
            implementation=self.implementation,
        )  # fmt: skip

    def _read_far(
        self, call: AttentionCall, q: Array, place: Array, far: Far, near: tuple[Array, Array], opened: int
    ) -> tuple[Array, Array]:
        """(out, lse) over near keys, keys of opened clusters and centroids."""
        xp, found = call.xp, far.clusters
        always = -(-min(self.sinks, call.k.shape[-2]) // self.cluster_size)
        if call.causal:
            before = place // self.chunk
            seen = xp.where(before > 0, before * -(-self.chunk // self.cluster_size) + always, 0)
            of_rows: tuple[Any, ...] = (None, None, None)
        else:
            seen = xp.zeros_like(place) + found.counts.shape[-1]
            of_rows = found.order, place, far.cluster_of
        order, place, cluster_of = of_rows
        return clustered_attention(
            q, found.k, found.v, order, found.means, found.spread, found.mean_values, found.counts, seen, place,
            cluster_of, *near, scale=call.scale, opened=opened, always=always,
            reach=0 if call.causal else self.window, implementation=self.implementation,
        )  # fmt: skip

    def _far(self, call: AttentionCall) -> Far:
        """The clusters that rows read."""
        call = _with_own_keys(call)
        sinks = min(self.sinks, call.k.shape[-2])
        return Far(self._of_chunks(call, sinks), None) if call.causal else self._of_all(call, sinks)

    def _extra_bytes(self, call: AttentionCall) -> int | None:
        d, d_v, n, n_kv = call.q.shape[-1], call.v.shape[-1], call.q.shape[-2], call.k.shape[-2]
        width = call.xp.finfo(call.q.dtype).bits // 8
        keys = math.prod(_with_own_keys(call).k.shape[:-2])
        clusters = 2 * n_kv // self.cluster_size + 2  # a chunk may be a little more than its clusters hold
        of_keys = 3 * (clusters * self.cluster_size // 2 + n_kv) * (d + d_v) + clusters * (2 * d + d_v)
        near = math.prod(call.batch()) * n * (d_v + 1)
        return width * (keys * of_keys + near) + THREADS_BYTES

    def _of_chunks(self, call: AttentionCall, sinks: int) -> KeyClusters:
        """The clusters of all chunks but the last, each with Σ of the queries up to its end, and the sinks before."""
        xp, chunk = call.xp, self.chunk
        chunks = (call.k.shape[-2] - 1) // chunk
        k, v, seen = (x[..., : chunks * chunk, :] for x in (call.k, call.v, _seen(call)[..., None]))
        seen = seen[..., 0]
        clustered = seen & (xp.arange(chunks * chunk, device=place_of(k)) >= sinks)
        metrics, number = _metrics(call, chunks, chunk)
        metric = xp.take(metrics, number, axis=-3)
        rows = xp.reshape(k, (*k.shape[:-2], chunks, chunk, k.shape[-1]))
        held = xp.reshape(clustered, (*clustered.shape[:-1], chunks, chunk))
        order = find_order(xp, rows, metric, held, self.cluster_size, self.seed, self.implementation)
        first = xp.arange(chunks, dtype=xp.int32, device=place_of(k))[:, None] * chunk
        order = xp.reshape(order + first, (*order.shape[:-2], -1))
        counts = counts_of(xp, held, self.cluster_size)
        counts = xp.reshape(counts, (*counts.shape[:-2], -1))
        return self._with_sinks(xp, k, v, seen, sinks, order, counts)

    def _of_all(self, call: AttentionCall, sinks: int) -> Far:
        """The clusters of all keys, and the cluster of each key."""
        xp, k, size, n = call.xp, call.k, self.cluster_size, call.k.shape[-2]
        seen = _seen(call)
        clustered = seen & (xp.arange(n, device=place_of(k)) >= sinks)
        metric = query_metric(xp, _moment(call, slice(None)))
        order = find_order(xp, k, metric, clustered, size, self.seed, self.implementation)
        cluster_of = xp.astype(xp.argsort(order[..., :n], axis=-1), xp.int32) // size + -(-sinks // size)
        found = self._with_sinks(xp, k, call.v, seen, sinks, order, counts_of(xp, clustered, size))
        return Far(found, xp.where(clustered, cluster_of, -1))

    def _with_sinks(
        self, xp: ModuleType, k: Array, v: Array, seen: Array, sinks: int, order: Array, counts: Array
    ) -> KeyClusters:
        """The summaries of clusters, with those of the first keys before them."""
        size = self.cluster_size
        if sinks:
            own = seen[..., :sinks]
            first = xp.astype(xp.argsort(xp.astype(~own, xp.int32), axis=-1, stable=True), xp.int32)
            lacking = -sinks % size
            if lacking:
                first = xp.concat(
                    [first, xp.zeros((*own.shape[:-1], lacking), dtype=xp.int32, device=place_of(k))], axis=-1
                )
            order, counts = (
                xp.concat([xp.broadcast_to(x, (*y.shape[:-1], x.shape[-1])), y], axis=-1)
                for x, y in ((first, order), (counts_of(xp, own, size), counts))
            )
        return summarize_clusters(xp, k, v, order, counts, size)


def _with_own_keys(call: AttentionCall) -> AttentionCall:
    """The call with keys that no two items share, apart from heads (axis −3): clusters depend on the queries."""
    xp, k, mask = call.xp, call.k, call.key_mask
    of_mask = () if mask is None else mask.shape[:-1]
    batch = broadcast_batch(q=call.q.shape[:-2], k=k.shape[:-2], mask=of_mask)
    if batch:
        batch = (*batch[:-1], *(broadcast_batch(k=k.shape[-3:-2], mask=of_mask[-1:]) or (1,)))
    return call.with_keys(xp.broadcast_to(k, (*batch, *k.shape[-2:])), call.v, mask)


def _seen(call: AttentionCall) -> Array:
    """Whether each key is visible, (..., n_kv), of the batch of keys."""
    xp, k = call.xp, call.k
    if call.key_mask is None:
        return xp.ones(k.shape[:-1], dtype=xp.bool, device=place_of(k))
    return xp.broadcast_to(call.key_mask, k.shape[:-1])


def _moment(call: AttentionCall, rows: slice) -> Array:
    """Σ q qᵀ over some rows, (..., d, d), of the batch of keys: heads that share keys are added up."""
    xp, q = call.xp, call.q[..., rows, :]
    if call.key_mask is not None and call.q.shape[-2] == call.k.shape[-2]:
        q = xp.where(call.key_mask[..., rows][..., None], q, 0.0)
    moment = xp.matrix_transpose(q) @ q
    if moment.ndim > 2 and moment.shape[-3] > 1 and call.k.shape[-3:-2] in ((), (1,)):
        moment = xp.sum(moment, axis=-3, keepdims=True)
    return moment


def _metrics(call: AttentionCall, chunks: int, chunk: int) -> tuple[Array, Array]:
    """(the metrics (..., r, d, d) of a causal call, which of them each chunk has).

    They are renewed whenever the number of chunks has grown by a third to a half.
    """
    xp, n, ahead = call.xp, call.q.shape[-2], call.k.shape[-2] - call.q.shape[-2]
    moments: list[Array] = []
    number: list[int] = []
    first = 0
    for c in range(chunks):
        if c < 4 or c % 2 ** (c.bit_length() - 2) == 0:
            last = min(max((c + 1) * chunk - ahead, first), n)
            part = _moment(call, slice(first, last))
            moments.append(moments[-1] + part if moments else part)
            first = last
        number.append(len(moments) - 1)
    index = xp.asarray(number, dtype=xp.int32, device=place_of(call.k))
    return query_metric(xp, xp.stack(moments, axis=-3)), index
