"""Attention to clusters of keys: near keys and a few opened clusters exactly, all other clusters by their centroids.

    out = softmax over [ s q·k of near keys and of keys of opened clusters;  w of the other clusters ] · [ v;  v̄ ]

Clusters are made by content, so that a row finds the keys that matter to it wherever they lie. O(n² / cluster_size)
time with a small constant, O(n) memory. In long sequences, far clusters are read in groups, by one centroid for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

from subquad.attention.call import AttentionCall, enter
from subquad.attention.cluster_parts import PART, read_all, read_rows
from subquad.attention.clustered_stream import CLUSTERED_STATE, attend, merge, step, summarize
from subquad.attention.key_clusters import KeyClusters, with_groups
from subquad.attention.method import Merging, Method
from subquad.attention.query_metric import with_own_keys
from subquad.attention.restrictions import NONE
from subquad.attention.window import SIZE
from subquad.backend import Array
from subquad.core.checks import check_count, check_number, check_seed
from subquad.core.states import State
from subquad.kernels.block_attention import block_attention
from subquad.kernels.clustered_attention import bands_of, clustered_attention
from subquad.registry import register

SCRATCH = 2**24  # bytes of the scratch of compiled kernels, at most
LARGEST_POWER = 0.5  # of Σ, in which queries tell keys apart by the mean square of their products
GROUPS = 4  # groups of clusters of a chunk: two splits of its tree


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
    spans : int, default 8
        In causal calls, chunks that are clustered again, all their keys together, when the last of them is full; so are
        those of spans² chunks, and so on. 1: none.
    expanded : int or None, default None
        Groups of clusters that a query reads cluster by cluster, where there are more; it reads the others as one
        centroid each. A group is a quarter of the clusters of a chunk, also in calls that are not causal. None: all.
    share : float, default 0
        A query opens a cluster only if it expects there this share, or more, of the weight of all keys but the sinks.
        So it reads many clusters where many matter, at most `opened`, and few elsewhere. 0: always `opened` of them.
    power : float, default 0.25
        How much the queries decide which keys are alike, 0 to 0.5: keys are clustered as rows k Σ^power, with Σ the
        second moment of the queries. 0: as they lie, 0.5: by the mean square of q·(k − k'). Long sequences in large
        clusters have smaller errors with 0.4; a few heads that look for one key are served best by less.
    seed : int, default 0
        Seed of the random directions by which the row farthest from the mean of a set is found.
    implementation : str, default "auto"
        "auto" takes the first override of the library's backend that accepts the call, "generic" the form in plain
        Array API. The name of an override forces that override: ValueError, with the reasons, if it cannot take a call.

    Notes
    -----
    A cluster of n keys with mean μ and mean value v̄ that stays closed has the weight exp(w) and the value v̄, with

        w = s q·μ + s² ((q·u)² + Σ_b τ_b Σ_{l in b} q_l²) / 4 + log n.

    (q·u)² is the variance of q·k along the direction in which the keys of the cluster spread most, and τ what is left
    of the variance of a channel, on average over each of four bands b of channels, which count as much as the squares
    of queries in them. The clusters of the largest w are opened, those that have the `share`. All weights are positive
    and there is one softmax over all of them, so an output is a convex combination of values; with every cluster opened
    it is exact attention. A key counts once: those read exactly because they are near are left out of their cluster.

    Clusters come from splitting rows k Σ^power in halves of equal size, and u is found among them, with Σ the second
    moment of the queries (of all heads that share the keys, without those that are not finite, or hidden by
    `key_mask`). In causal calls, Σ of a chunk sums up the queries up to its end, or up to the end of an earlier chunk,
    at least two thirds of them, so that no later token changes an earlier row. Which keys lie together and which
    clusters are opened is constant for gradients. The place of query i is i + n_kv − n. A program that is traced serves
    one length. The state of `step` holds the clusters of the chunks that are full and the keys of the open one. It
    grows by k, v and a part of a cluster for each token, and is read sparsely. Steps are the causal call, however they
    are cut. `summarize` puts all keys of a chunk into clusters; a row that `attend` computes has no near keys but those
    that are open. States merge in any order, to the keys of both, in clusters that depend on the order. Kernels:
    `balanced_tree`, `block_attention`, `cluster_members`, `cluster_spread`, `clustered_attention`.

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
    state = CLUSTERED_STATE

    cluster_size: int = 16
    opened: int = 16
    chunk: int = 256
    sinks: int = 4
    window: int = 8
    spans: int = 8
    expanded: int | None = None
    share: float = 0.0
    power: float = 0.25
    seed: int = 0
    implementation: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cluster_size", "opened", "chunk", "sinks", "window", "spans"):
            check_count(name, getattr(self, name), least=1 if name in ("cluster_size", "chunk", "spans") else 0)
        if self.expanded is not None:
            check_count("expanded", self.expanded, least=0)
        if not 0 <= check_number("share", self.share) < 1:
            msg = f"share must be at least 0 and less than 1, got {self.share}; 0 opens as many clusters in every row"
            raise ValueError(msg)
        if not 0 <= check_number("power", self.power) <= LARGEST_POWER:
            msg = f"power must lie in 0 … {LARGEST_POWER}, got {self.power}; 0.25 is the default"
            raise ValueError(msg)
        check_seed(self.seed)
        if self.sinks > self.chunk:
            msg = f"sinks={self.sinks} are more keys than a chunk has, {self.chunk}; pass a larger chunk or fewer sinks"
            raise ValueError(msg)

    def _evaluate(self, call: AttentionCall) -> Array:
        return self._evaluate_with_lse(call.restricted(NONE))[0]

    def _evaluate_with_lse(self, call: AttentionCall) -> tuple[Array, Array]:
        return read_all(self._within(call), call)

    def _within(self, call: AttentionCall) -> Clustered:
        """This method with sizes that lie within the sequences of a call: larger ones mean all of it."""
        n, n_kv, holds = call.q.shape[-2], call.k.shape[-2], call.arrangement.backend.holds
        most = {"cluster_size": max(n_kv, 1), "chunk": max(n_kv, self.sinks, 1), "window": n + n_kv}
        larger = {name: size for name, size in most.items() if holds(getattr(self, name) > size)}
        return replace(self, **larger) if larger else self

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
        arrays = {"q": q, "k": k, "v": v}
        call = enter(None, arrays, key_mask=key_mask, causal=causal, scale=scale, owner=self, as_stored=True)
        if not call.arrangement.backend.may_fill(q, k, v):
            call = call.widened()
        return read_rows(self._within(call), call, rows, opened)

    def bare_rows(self, call: AttentionCall) -> range:
        """The rows with no key near them but their own: in causal calls the first of each chunk, except the first."""
        if not call.causal:
            return range(0)
        n, chunk, ahead = call.q.shape[-2], self.chunk, call.k.shape[-2] - call.q.shape[-2]
        return range(max(chunk, -(-ahead // chunk) * chunk) - ahead, n, chunk)

    def _reads_half(self, *, streaming: bool = False) -> bool:
        return not streaming

    def _extra_bytes(self, call: AttentionCall) -> int | None:
        d, d_v, n, n_kv = call.q.shape[-1], call.v.shape[-1], call.q.shape[-2], call.k.shape[-2]
        width = call.xp.finfo(call.arrangement.compute).bits // 8
        keys, heads = (max(1, math.prod(x)) for x in (with_own_keys(call).k.shape[:-2], call.batch()))
        slots = n_kv + n_kv // self.chunk * self.cluster_size + 2 * self.cluster_size
        of_keys = slots * (5 * d + 3 * d_v) + slots // self.cluster_size * (3 * d + bands_of(d) + d_v)
        of_rows = min(heads * n * (d_v + 1), 2 * PART) + heads * n
        return width * (keys * of_keys + of_rows) + SCRATCH

    def summarize(
        self,
        k: Array,
        v: Array,
        /,
        *,
        queries: Array | None = None,
        key_mask: Array | None = None,
        scale: float | None = None,
    ) -> State:
        """Put a chunk of keys and values into clusters, which `attend` reads and `merge` and `step` continue.

        Parameters
        ----------
        k, v : array, shape (..., n, d) and (..., n, d_v)
            Keys and values of the chunk.
        queries : array, shape (..., m, d), optional
            Queries like those that will read the keys, a sample of them or those at the places of the keys: keys that
            they tell apart then lie in clusters apart. Default: none, all directions count alike.
        key_mask : array of bool, broadcastable to (..., n), optional
            True = keep.
        scale : None
            A number raises ValueError: the state does not depend on the scale, `attend` takes it.

        Returns
        -------
        dict of array
            All keys and values in clusters, and what is told of a cluster that stays closed, at least float32.

        Raises
        ------
        TypeError, ValueError
            As `subquad.attention`.
        """
        if scale is not None:
            msg = f"scale={scale!r} would have no effect: the state of Clustered is free of it; give it to attend"
            raise ValueError(msg)
        if queries is None:
            call = enter(None, {"k": k, "v": v}, key_mask=key_mask)
            call = call.with_rows(call.k[..., :0, :], call.k, {})
        else:
            call = enter(None, {"q": queries, "k": k, "v": v}, key_mask=key_mask)
        with call.computing():
            return call.leave_state(summarize(self, call))

    def _summarize(self, call: AttentionCall) -> State:
        return summarize(self, call)

    def _merging(self) -> Merging:
        return partial(merge, self)

    def _attend(self, call: AttentionCall) -> Array:
        return attend(self, call)

    def _step(self, call: AttentionCall) -> tuple[Array, State]:
        return step(self, call)

    @property
    def clusters_of_sinks(self) -> int:
        """How many clusters the sinks fill."""
        return -(-self.sinks // self.cluster_size)

    @property
    def clusters_of_chunk(self) -> int:
        """How many clusters a chunk has."""
        return -(-self.chunk // self.cluster_size)

    @property
    def group(self) -> int:
        """How many clusters a group has."""
        return max(self.clusters_of_chunk // GROUPS, 1)

    def grouped(self, xp: ModuleType, found: KeyClusters) -> KeyClusters:
        """The clusters with the summaries of their groups."""
        return with_groups(xp, found, self.group, self.clusters_of_sinks)

    def clusters_before(self, xp: ModuleType, chunks: Array) -> Array:
        """How many clusters the first chunks of a sequence have, with those of the sinks."""
        return xp.where(chunks > 0, chunks * self.clusters_of_chunk + self.clusters_of_sinks, 0)

    def read(
        self, call: AttentionCall, found: KeyClusters, q: Array, stop: Array, near: tuple[Array, Array],
        of_rows: tuple[Array | None, ...] = (None, None, None),
    ) -> tuple[Array, Array]:  # fmt: skip
        """(out, lse) over `near` and over the first `stop[i]` clusters, by the kernel."""
        order, place, cluster_of = of_rows
        clusters = found.counts.shape[-1]
        always = min(self.clusters_of_sinks, clusters)
        expanded = self.expanded  # where a row expands all groups, or a group is a cluster, there are none
        has_groups = expanded is not None and self.group > 1 and max(clusters - always, 0) // self.group > expanded
        groups = self.grouped(call.xp, found).groups if has_groups else None
        return clustered_attention(
            q, found.k, found.v, order, found.means, found.spread, found.mean_values, found.counts,
            *(groups or (None, None, None)), stop, place, cluster_of, *near, scale=call.scale,
            opened=min(self.opened, clusters - always), always=always, reach=0 if order is None else self.window,
            group=self.group if groups else 1, expanded=(expanded or 0) if groups else 0, share=self.share,
            implementation=self.implementation,
        )  # fmt: skip

    def read_keys(
        self, call: AttentionCall, q: Array, start: Array, stop: Array, blocks: Array | None
    ) -> tuple[Array, Array]:
        """(out, lse) over the keys within an interval."""
        return block_attention(
            q, call.k, call.v, start, stop, blocks, *[None] * 6, scale=call.scale, size=SIZE, wide=True,
            key_mask=call.key_mask, implementation=self.implementation,
        )  # fmt: skip
