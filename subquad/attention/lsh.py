"""Attention between queries and keys that are hashed to near buckets (Reformer).

    out = softmax(s q kᵀ, over the keys that a row meets in some round) v

In a round, rows are hashed by random rotations, h(x) = argmax [x R; −x R], sorted by bucket, and cut into chunks; a
chunk of queries meets the chunk of keys of its rank and the one before. O(n log n) time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from subquad.attention.call import AttentionCall
from subquad.attention.checks import check_rows
from subquad.attention.method import Method
from subquad.attention.rest import centroids, check_rest
from subquad.attention.restrictions import NONE, sight_of
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_arrays, check_count, check_flag, check_floating, check_seed
from subquad.core.dtypes import cast, compute_dtype
from subquad.core.gather import gather, gather_rows
from subquad.core.loading import backend_of
from subquad.kernels.block_attention import block_attention, join
from subquad.kernels.hashed_attention import hashed_attention, key_chunks, key_chunks_met
from subquad.kernels.hashed_order import hashed_order
from subquad.kernels.visibility import Sight
from subquad.random import generator
from subquad.registry import register

ONE_FACTOR = 128  # buckets from which on their number is a product of two, each hashed by rotations of its own


@register(
    "lsh",
    aliases=("reformer",),
    cost="num_rounds n bucket_size (d + d_v)",
    size="num_rounds",
    defaults=({"num_rounds": 1}, {"num_rounds": 4}),
)
@dataclass(frozen=True, repr=False, eq=False)
class LSH(Method):
    """Attention to keys of near buckets of a locality-sensitive hash (Reformer).

    Parameters
    ----------
    bucket_size : int, default 64
        Rows of a chunk, and about how many rows a bucket has.
    num_rounds : int, default 4
        Number of rounds, each with rotations of its own. A pair that meets in several rounds is counted once.
    seed : int, default 0
        Seed of the rotations; ValueError beside `rotations`.
    rotations : array, shape (num_rounds, d, columns), optional
        Rotations R in place of drawn ones. They are read as the two factors that the length asks for (see Notes) if
        they have as many columns, else as 2 · columns buckets.
    shared_qk : bool, default False
        Whether queries and keys are one array, which is hashed and sorted once: `q` must be given as `k` too.
    unit_keys : bool, default False
        Whether keys are divided by their norm (Reformer).
    allow_self : bool, default True
        Whether a query sees the key at its own place. If not, it does only where it sees nothing else (Reformer).
    rest : {None, "centroids"}, default None
        What becomes of the keys that a query does not meet: None, they have no weight; "centroids", they enter as
        centroids of clusters (see Notes). Not in causal calls, for the clusters sum up later keys too; not beside
        `visible`; and beside ``allow_self=False`` only with ``shared_qk=True``.
    rest_size : int, optional
        Keys of a cluster, of which a chunk has ⌈bucket_size / rest_size⌉; ValueError without `rest`. Default: 16.
    implementation : str, default "auto"
        "auto" takes the first override of the library's backend that accepts the call, "generic" the form in plain
        Array API. The name of an override forces that override: ValueError, with the reasons, if it cannot take a call.

    Notes
    -----
    There are ⌈max(n, n_kv) / bucket_size⌉ buckets, rounded up to an even number b. Above 128, b becomes the product of
    two even factors near its root, hashed apart, so that hashing does not grow like n². Rows are sorted by (bucket,
    place), hidden keys in one bucket after all others. Chunk c of queries meets the key chunks ⌊c · chunks of keys /
    chunks of queries⌋ and the one before; there is no wrap, and all buckets within them meet. In causal calls, values
    of later keys change nothing, but which earlier keys a query meets depends on the buckets of all keys. Reformer's
    convention is ``LSH(shared_qk=True, unit_keys=True, allow_self=False)``, called with ``scale=1`` for models of
    transformers and trax; reformer-pytorch scales by d ** -0.5. Kernels: `hashed_order`, `hashed_attention`.

    With ``rest="centroids"``, the keys of each chunk of the first round are clustered by content. A cluster of which a
    query meets all but n keys enters its softmax with the value v̄ and the weight exp(s q·μ + s² Σ_l q_l² σ²_l / 4 +
    log n), for the mean μ, the variances σ² and the mean value v̄ of all its keys. One key out of 64, at least one of
    each chunk, that of the smallest norm, is a cluster of its own. Each key counts once, and all weights are positive.
    Which keys lie together is constant for gradients. O(n² / rest_size) time, with several rounds also O(n² num_rounds)
    comparisons of integers; O(n) memory. Kernels: `balanced_tree`, `cluster_members`,
    `cluster_spread`, `centroid_attention`.

    References
    ----------
    .. [1] N. Kitaev et al., "Reformer: The Efficient Transformer", 2020, section 2 (eqs. (2)–(5)) and appendix A.
    .. [2] A. Andoni et al., "Practical and Optimal LSH for Angular Distance", 2015.
    .. [3] A. Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", 2024: keys of a
       small norm draw much weight.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 8))
    >>> one_bucket = subquad.attention(q, k, v, "lsh", bucket_size=100)
    >>> bool(np.allclose(one_bucket, subquad.attention(q, k, v, "exact")))
    True
    """

    restrictions = frozenset({"segments", "visible"})
    reads = frozenset({"visible"})

    bucket_size: int = 64
    num_rounds: int = 4
    seed: int | None = None
    rotations: Array | None = None
    shared_qk: bool = False
    unit_keys: bool = False
    allow_self: bool = True
    rest: str | None = None
    rest_size: int | None = None
    implementation: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("bucket_size", self.bucket_size)
        check_count("num_rounds", self.num_rounds)
        for name in ("shared_qk", "unit_keys", "allow_self"):
            check_flag(name, getattr(self, name))
        if self.seed is not None:
            check_seed(self.seed)
            if self.rotations is not None:
                msg = f"seed={self.seed} would have no effect: rotations are given"
                raise ValueError(msg)
        check_rest(self.rest, self.rest_size)
        if self.rest is not None and not (self.allow_self or self.shared_qk):
            msg = "allow_self=False beside rest: a centroid may hold the key at a query's place; pass shared_qk=True"
            raise NotImplementedError(msg)

    def with_rotations(self, q: Array, k: Array | None = None, /) -> LSH:
        """Fix the draw: return this method with the rotations for these queries and keys as an array.

        Parameters
        ----------
        q : array, shape (..., n, d)
            Queries, whose width, length, library and dtype count; their values do not.
        k : array, shape (..., n_kv, d), optional
            Keys, whose length counts. Default: `q`.

        Returns
        -------
        LSH
            The method with `rotations` as an array (num_rounds, d, columns).

        Raises
        ------
        TypeError, ValueError
            If `q` or `k` is no array (..., n, d).
        """
        xp = check_rows({}, q=q, **({} if k is None else {"k": k}))
        factors = bucket_factors(max(q.shape[-2], q.shape[-2] if k is None else k.shape[-2]), self.bucket_size)
        made = self._rotations(xp, q, factors, q.dtype)
        return replace(self, rotations=made, seed=None)

    def _reads_half(self, *, streaming: bool = False) -> bool:
        return not streaming and self.rest is None  # outputs that are joined must not be rounded before

    def _evaluate(self, call: AttentionCall) -> Array:
        return self._evaluate_with_lse(call.restricted(NONE))[0]

    def _evaluate_with_lse(self, call: AttentionCall) -> tuple[Array, Array]:
        xp, q, k, n, n_kv = call.xp, call.q, call.k, call.q.shape[-2], call.k.shape[-2]
        self._check_shared(call)
        if self.rest is not None:
            self._check_rest(call)
        sight = sight_of(call)
        factors = bucket_factors(max(n, n_kv), self.bucket_size)
        rotations = self._rotations(xp, q, factors, compute_dtype(xp, q))
        if n == 0 or n_kv == 0:
            nothing = q, k, call.v, sight.start, sight.stop, *[None] * 7
            return block_attention(*nothing, scale=call.scale, size=1, key_mask=call.key_mask)
        if self.unit_keys:
            k = cast(xp, k, compute_dtype(xp, k))
            assert k is not None
            if call.key_mask is not None:  # a hidden key enters no norm, nor its gradient, even if it is NaN
                k = xp.where(call.key_mask[..., None], k, 0.0)
            square = xp.sum(k * k, axis=-1, keepdims=True)
            k = k / xp.sqrt(xp.where(square == 0, 1.0, square))

        size = min(self.bucket_size, max(n, n_kv))  # a short chunk is not filled up to a long one
        columns = rotations.shape[-1]
        first, second = (*factors, 0)[:2] if sum(factors) == 2 * columns else (2 * columns, 0)
        hashing: dict[str, Any] = {"first": first, "second": second, "size": size}
        hashing["implementation"] = "generic" if self.implementation == "generic" else "auto"
        order_k, chunk_k = hashed_order(call.k, rotations, key_mask=call.key_mask, **hashing)
        order_q, chunk_q = (order_k, chunk_k) if self.shared_qk else hashed_order(q, rotations, **hashing)
        out, lse = hashed_attention(
            q, k, call.v, sight.start, sight.stop, None if self.allow_self else sight.place, order_q, order_k, chunk_q,
            chunk_k, scale=call.scale, size=size, key_mask=call.key_mask, implementation=self.implementation,
        )  # fmt: skip
        if self.rest is not None:
            out, lse = join(xp, (out, lse), self._over_rest(call, k, order_q, order_k, size))
        return (out, lse) if self.allow_self else self._or_self(call, k, sight, out, lse)

    def _check_rest(self, call: AttentionCall) -> None:
        """NotImplementedError for what centroids, which sum up keys of any place, do not allow."""
        if call.causal:
            msg = "rest in a causal call: the clusters of sorted keys have later keys too; 'window' has a causal rest"
            raise NotImplementedError(msg)
        if call.restrictions.visible is not None:
            msg = "visible beside rest: a row may see a part of a cluster alone; leave one of them out"
            raise NotImplementedError(msg)

    def _over_rest(
        self, call: AttentionCall, k: Array, order_q: Array, order_k: Array, size: int
    ) -> tuple[Array, Array]:
        """(out, lse) over the centroids of the keys that rows meet in no round."""
        xp, mask, n, n_kv = call.xp, call.key_mask, call.q.shape[-2], k.shape[-2]
        rows, keys = order_q[..., 0, :], order_k[..., 0, :]
        mask = None if mask is None else gather(xp, mask, keys)
        k, v = gather_rows(xp, k, keys), gather_rows(xp, call.v, keys)
        found = centroids(xp, k, v, mask, size, self.rest_size, self.implementation)
        own, met = key_chunks(xp, n, n_kv, size, call.q), None
        if self.num_rounds > 1:
            of_rows, of_keys = [], []
            members = xp.reshape(found.members, (*found.members.shape[:-2], math.prod(found.members.shape[-2:])))
            for r in range(1, self.num_rounds):
                rank_q, rank_k = (_inverse(xp, x[..., r, :]) for x in (order_q, order_k))
                of_rows.append(gather(xp, key_chunks_met(xp, rank_q // size, own, n_kv, size), rows))
                of_keys.append(gather(xp, gather(xp, rank_k // size, keys), xp.where(members < 0, 0, members)))
            met = xp.stack(of_rows, axis=-1), xp.stack(of_keys, axis=-1)
        out, lse = found.attend(
            gather_rows(xp, call.q, rows), xp.stack([own - 1, own], axis=-1), scale=call.scale, size=size,
            implementation=self.implementation, met=met,
        )  # fmt: skip
        back = _inverse(xp, rows)
        return gather_rows(xp, out, back), gather(xp, lse, back)

    def _or_self(self, call: AttentionCall, k: Array, sight: Sight, out: Array, lse: Array) -> tuple[Array, Array]:
        """Rows that see nothing else get the value at their own place, if they may see it."""
        xp, n_kv = call.xp, k.shape[-2]
        exists = (sight.place >= sight.start) & (sight.place < sight.stop) & (sight.place >= 0) & (sight.place < n_kv)
        place = xp.where(exists, sight.place, 0)
        if call.key_mask is not None:
            exists = exists & gather(xp, call.key_mask, place)
        alone = exists & (lse == -math.inf)
        row: Any = cast(xp, call.q, lse.dtype)
        logit = xp.sum(row * cast(xp, gather_rows(xp, k, place), lse.dtype), axis=-1) * call.scale
        own = xp.where(alone[..., None], cast(xp, gather_rows(xp, call.v, place), out.dtype), 0.0)
        return xp.where(alone[..., None], own, out), xp.where(alone, logit, lse)

    def _rotations(self, xp: ModuleType, like: Array, factors: tuple[int, ...], dtype: Any) -> Array:
        """The rotations (num_rounds, d, columns), given or drawn."""
        d, columns = like.shape[-1], sum(factors) // 2
        if self.rotations is None:
            backend = backend_of(xp)
            # `torch.compile(dynamic=True)` has no source for sizes of an array made here, and lists have none
            drawing = _on_host if backend.is_concrete(like) else _as_lists
            host = backend.on_host(drawing, self.num_rounds, d, columns, self.seed or 0)
            return xp.asarray(host, dtype=dtype, device=place_of(like))
        check_arrays(q=like, rotations=self.rotations)
        check_floating(xp, rotations=self.rotations)
        shape = tuple(self.rotations.shape)
        if len(shape) != 3 or shape[:2] != (self.num_rounds, d) or shape[2] == 0:
            msg = f"rotations has shape {shape}, expected ({self.num_rounds}, {d}, columns)"
            raise ValueError(msg)
        return cast(xp, self.rotations, dtype)

    def _check_shared(self, call: AttentionCall) -> None:
        """ValueError if queries and keys that should be one array differ."""
        if not self.shared_qk or call.q is call.k:
            return
        same = call.q.shape == call.k.shape
        if same and backend_of(call.xp).is_concrete(call.q, call.k):
            same = bool(call.xp.all((call.q == call.k) | ((call.q != call.q) & (call.k != call.k))))
        if not same:
            msg = "shared_qk=True says that queries and keys are one array, but q and k differ; pass q as k"
            raise ValueError(msg)

    def _in_force(self) -> dict[str, Any]:
        options = super()._in_force()
        options["seed"] = self.seed or 0
        unused = "rotations" if self.rotations is None else "seed"
        unset = [name for name in ("rest", "rest_size") if options[name] is None]
        return {name: x for name, x in options.items() if name not in (unused, *unset)}


def bucket_factors(n: int, size: int) -> tuple[int, ...]:
    """The numbers of buckets of each hash, whose product is the number of buckets of n rows."""
    count = -(-n // size)
    count = max(2, count + count % 2)
    if count <= ONE_FACTOR:
        return (count,)
    first = 2 * math.ceil(math.sqrt(count) / 2)
    second = -(-count // first)
    return first, second + second % 2


def _on_host(rounds: int, d: int, columns: int, seed: int) -> Any:
    """A copy of `_drawn(…)`; a plain function, because tracers cannot be told to call an `lru_cache` object."""
    return _drawn(rounds, d, columns, seed).copy()


def _as_lists(rounds: int, d: int, columns: int, seed: int) -> Any:
    """The numbers of `_drawn(…)` as lists of lists, which programs hold as constants."""
    return _drawn(rounds, d, columns, seed).tolist()


def _inverse(xp: ModuleType, order: Array) -> Array:
    """The rank of each row in an order of all rows, int32."""
    return xp.astype(xp.argsort(order, axis=-1), xp.int32)


@lru_cache(maxsize=32)
def _drawn(rounds: int, d: int, columns: int, seed: int) -> Any:
    """The rotations (rounds, d, columns), read-only, as they are kept."""
    drawn = np.stack([generator(seed, r).standard_normal((d, columns)) for r in range(rounds)])
    drawn.setflags(write=False)
    return drawn
