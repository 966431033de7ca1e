"""BigBird attention: blocks of keys near a block of queries, global blocks, and random blocks.

    out = softmax(s q kᵀ, over the keys of the window, global and random blocks of a row's block) v

O(n · block_size · (window + global + random blocks) · (d + d_v)) time; extra memory does not grow with n.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from subquad.attention.call import AttentionCall
from subquad.attention.method import Method
from subquad.attention.rest import Centroids, centroids, check_rest
from subquad.attention.restrictions import NONE, sight_of
from subquad.backend import Array
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import join_rows
from subquad.core.checks import check_count, check_seed
from subquad.core.host import to_host
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.block_attention import block_attention, join
from subquad.random import generator
from subquad.registry import register

ROWS = 2048  # rows of a part of the output, where parts are written into one array
KEPT_ROWS = 4096  # rows up to which the lists of a remembered call are kept: longer calls have time to make them
Host = np.ndarray[Any, np.dtype[np.int32]]


@register(
    "bigbird",
    cost="n block_size (window + global + random) (d + d_v)",
    size="block_size",
    defaults=({"block_size": 16}, {"block_size": 64}),
)
@dataclass(frozen=True, repr=False, eq=False)
class BigBird(Method):
    """BigBird attention: a block of queries reads near blocks of keys, global blocks and random blocks.

    Parameters
    ----------
    block_size : int, default 64
        Rows of a block; the last block may have fewer.
    window_blocks : int, default 3
        How many key blocks around its own a block of queries reads; an odd number.
    global_blocks : tuple of two int, default (1, 1)
        How many first and how many last key blocks every query reads. The blocks of queries at these places read every
        key.
    num_random_blocks : int, default 3
        How many further blocks each block of queries reads, drawn for each head without replacement among the blocks
        that are visible to it and neither near nor global; all of them where there are fewer.
    seed : int, default 0
        Seed of the random blocks; ValueError beside `plan`.
    plan : array of int, shape (q_blocks, r) or (heads, q_blocks, r), optional
        The random blocks, −1 for none, in place of drawn ones. The numbers must be readable.
    rest : {None, "centroids"}, default None
        What becomes of the blocks that a query does not read: None, they have no weight; "centroids", they enter as
        centroids of clusters (see Notes). It cannot be joined with `visible`; in causal calls it needs three window
        blocks if n_kv − n is no multiple of `block_size`.
    rest_size : int, optional
        Keys of a cluster, of which a block has ⌈block_size / rest_size⌉; ValueError without `rest`. Default: 16.
    implementation : str, default "auto"
        "auto" takes the first override of the library's backend that accepts the call, "generic" the form in plain
        Array API. The name of an override forces that override: ValueError, with the reasons, if it cannot take a call.

    Notes
    -----
    Query i has the place i + n_kv − n, and the block of queries whose first row has the place p is at key block
    ⌊p / block_size⌋. A key is counted once, even if window, global and random blocks overlap. The plan depends on the
    seed, the head and the number of blocks alone, so it is one and the same in training and evaluation (transformers
    reads block 0 in place of every random block in evaluation). Causality wins over global blocks, and a causal plan is
    drawn among earlier blocks. Kernel: `block_attention`.

    With ``rest="centroids"``, the keys of each block are clustered by content. A cluster of n keys in a block that a
    query does not read, in causal calls one before its own, enters its softmax with the value v̄ and the weight
    exp(s q·μ + s² Σ_l q_l² σ²_l / 4 + log n), for the mean μ, the variances σ² and the mean value v̄ of its keys. One
    key out of 64, at least one of each block, that of the smallest norm, is a cluster of its own. Each key counts once,
    and all weights are positive. Which keys lie together is constant for gradients. O(n² / rest_size) time and O(n)
    memory. Kernels: `balanced_tree`, `cluster_members`,
    `cluster_spread`, `centroid_attention`.

    References
    ----------
    .. [1] M. Zaheer et al., "Big Bird: Transformers for Longer Sequences", 2020, section 2 and appendix D.
    .. [2] A. Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", 2024: keys of a
       small norm draw much weight.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 8))
    >>> everything = subquad.attention(q, k, v, "bigbird", block_size=20, num_random_blocks=5)
    >>> bool(np.allclose(everything, subquad.attention(q, k, v, "exact")))
    True
    """

    restrictions = frozenset({"segments", "visible"})
    reads = frozenset({"visible"})

    block_size: int = 64
    window_blocks: int = 3
    global_blocks: tuple[int, int] = (1, 1)
    num_random_blocks: int = 3
    seed: int | None = None
    plan: Array | None = None
    rest: str | None = None
    rest_size: int | None = None
    implementation: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("block_size", self.block_size)
        if check_count("window_blocks", self.window_blocks) % 2 == 0:
            msg = f"window_blocks must be odd, as many blocks before as after a block's own, got {self.window_blocks}"
            raise ValueError(msg)
        if not isinstance(self.global_blocks, tuple) or len(self.global_blocks) != 2:
            msg = f"global_blocks must be a pair of numbers, of first and last blocks, got {self.global_blocks!r}"
            raise TypeError(msg)
        for i, count in enumerate(self.global_blocks):
            check_count(f"global_blocks[{i}]", count, least=0)
        check_count("num_random_blocks", self.num_random_blocks, least=0)
        check_rest(self.rest, self.rest_size)
        if self.seed is not None:
            check_seed(self.seed)
            if self.plan is not None:
                msg = f"seed={self.seed} would have no effect: plan says which blocks are read"
                raise ValueError(msg)

    def _reads_half(self, *, streaming: bool = False) -> bool:
        return not streaming and self.rest is None  # outputs that are joined must not be rounded before

    def _evaluate(self, call: AttentionCall) -> Array:
        return self._evaluate_with_lse(call.restricted(NONE))[0]

    def _evaluate_with_lse(self, call: AttentionCall) -> tuple[Array, Array]:
        xp, size, n = call.xp, self._size(call), call.q.shape[-2]
        place, start, stop = sight_of(call)
        if n == 0:
            nothing = call.q, call.k, call.v, start, stop, *[None] * 7
            return block_attention(*nothing, scale=call.scale, size=1, key_mask=call.key_mask)
        rest = self._rest(call, size)

        def part(rows: slice, listed: Array | None) -> tuple[Array, Array]:
            out, lse = block_attention(
                call.q[..., rows, :], call.k, call.v, start[..., rows], stop[..., rows], listed, *[None] * 6,
                scale=call.scale, size=size, key_mask=call.key_mask, implementation=self.implementation,
            )  # fmt: skip
            if rest is not None and listed is not None:
                own = place[..., rows] if call.causal else None
                others = rest.attend(call.q[..., rows, :], listed, scale=call.scale, size=size,
                                     implementation=self.implementation, place=own)  # fmt: skip
                out, lse = join(xp, (out, lse), others)
            return out, lse[..., None]

        if self.plan is None and n <= KEPT_ROWS:
            parts = call.made_of(self, "parts", None, lambda: (*self._parts(call, size),))
            if len(parts) == 1 and rest is None:  # the only call of the kernel
                return call.run(
                    self, block_attention, call.q, call.k, call.v, start, stop, parts[0][1], *[None] * 6,
                    scale=call.scale, size=size, key_mask=call.key_mask, implementation=self.implementation,
                )  # fmt: skip
        else:
            parts = self._parts(call, size)
        out, lse = join_rows(xp, n, (part(*one) for one in parts))
        return out, lse[..., 0]

    def _parts(self, call: AttentionCall, size: int) -> Iterator[tuple[slice, Array | None]]:
        """Parts of the rows, and the key blocks that the blocks of each part read; None where they read every key."""
        n, n_kv, listing = call.q.shape[-2], call.k.shape[-2], self._listing(call)
        blocks, blocks_kv = -(-n // size), -(-n_kv // size)
        most = max(1, ROWS // size) if call.arrangement.backend.fills_in_place else blocks
        # where key blocks are so few that a list has room for all, those of global queries are in the list too
        first, last = (0, 0) if blocks_kv <= listing.shape[-1] else self.global_blocks
        runs = backend_of(call.xp).on_host(_runs, blocks, blocks_kv, (n_kv - n) // size, first, last, most)
        for begin, end, is_whole in runs:
            listed = None if is_whole else self._listed(call, listing, begin, end)
            yield slice(begin * size, min(end * size, n)), listed

    def _rest(self, call: AttentionCall, size: int) -> Centroids | None:
        """The clusters of the keys of each block; None if what is not read has no weight."""
        n, n_kv = call.q.shape[-2], call.k.shape[-2]
        if self.rest is None:
            return None
        if call.restrictions.visible is not None:
            msg = "visible beside rest: a row may see a part of a block of keys alone; leave one of them out"
            raise NotImplementedError(msg)
        if call.causal and self.window_blocks < 3 and (n_kv - n) % size:
            msg = (
                f"window_blocks={self.window_blocks} beside rest in a causal call of {n} queries and {n_kv} keys: some "
                f"queries do not read their own block of {size} keys; pass window_blocks=3"
            )
            raise ValueError(msg)
        if n_kv == 0:
            return None
        return centroids(call.xp, call.k, call.v, call.key_mask, size, self.rest_size, self.implementation)

    def _size(self, call: AttentionCall) -> int:
        """Rows of a block: no more than there are, so that a short block is not filled up to a long one."""
        return min(self.block_size, max(call.q.shape[-2], call.k.shape[-2], 1))

    def _listing(self, call: AttentionCall) -> Host:
        """The key blocks that each block of queries reads, (q_blocks, r) or (heads, q_blocks, r)."""
        n, n_kv, size, heads = call.q.shape[-2], call.k.shape[-2], self._size(call), call.arrangement.heads
        batch = broadcast_batch(q=call.q.shape[:-2], k=call.k.shape[:-2], v=call.v.shape[:-2])
        count = math.prod(batch[-2:] if heads.groups > 1 else batch[-1:]) if batch else None
        first, last = self.global_blocks
        widest = 2 * (-(-n // size) + -(-n_kv // size)) + 1  # blocks of a window that reaches all
        shared = n, n_kv, size, min(self.window_blocks, widest), first, last
        if self.plan is None:
            return backend_of(call.xp).on_host(
                _listing, *shared, call.causal, self.num_random_blocks, self.seed or 0, count
            )
        return _with_random(*shared, self._given_plan(-(-n // size), -(-n_kv // size), count))

    def _listed(self, call: AttentionCall, listing: Host, begin: int, end: int) -> Array:
        """The part of the listing for the blocks of queries `begin` … `end` − 1, as the library's array, folded."""
        host = np.array(listing[..., begin:end, :])  # drawn plans are kept, and read-only
        return call.arrangement.heads.fold(call.xp.asarray(host, device=place_of(call.q)))

    def _given_plan(self, blocks: int, total: int, heads: int | None) -> Host:
        """The option `plan` on the host, checked for so many blocks of queries and of keys."""
        plan: Any = self.plan
        if not hasattr(plan, "shape") or not hasattr(plan, "dtype"):
            msg = f"plan must be an array of integers, got {type(plan).__name__}"
            raise TypeError(msg)
        batch = (1, heads) if heads is not None else (1,)
        fits = plan.ndim in (2, 3) and plan.shape[-2] == blocks and (plan.ndim == 2 or plan.shape[0] in batch)
        if not fits:
            msg = f"plan has shape {tuple(plan.shape)}, expected ({blocks}, r) or ({heads or 'heads'}, {blocks}, r)"
            raise ValueError(msg)
        if isinstance(plan, np.ndarray):
            host = plan
        else:
            if not backend_of(namespace_of(plan)).is_concrete(plan):
                msg = "plan of a program that is traced has no values; pass it as a constant of the program"
                raise ValueError(msg)
            host = to_host(plan)
        if host.dtype.kind not in "iu":
            msg = f"plan has dtype {host.dtype}, expected integers"
            raise TypeError(msg)
        wrong = host[(host < -1) | (host >= total)]
        if wrong.size:
            msg = f"plan names block {wrong[0]}, but there are {total} blocks of keys; expected 0 to {total - 1}, or −1"
            raise ValueError(msg)
        return host.astype(np.int32)

    def _in_force(self) -> dict[str, Any]:
        options = super()._in_force()
        unused = "plan" if self.plan is None else "seed"
        options["seed"] = self.seed or 0
        unset = [name for name in ("rest", "rest_size") if options[name] is None]
        return {name: x for name, x in options.items() if name not in (unused, *unset)}


def _runs(
    blocks: int, blocks_kv: int, shift: int, first: int, last: int, most: int
) -> tuple[tuple[int, int, bool], ...]:
    """(first, stop, whether they read every key) of runs of at most `most` blocks of queries.

    The block of queries b is at the key block b + `shift`.
    """
    edges = sorted({0, blocks, *(min(max(at - shift, 0), blocks) for at in (0, first, blocks_kv - last))})
    runs = []
    for a, b in itertools.pairwise(edges):
        at = a + shift
        is_whole = at >= 0 and (at < first or at >= blocks_kv - last)
        runs += [(i, min(i + most, b), is_whole) for i in range(a, b, most)]
    return tuple(runs)


def _listing(*numbers: Any) -> Host:
    """All blocks that each block of queries reads, with random ones drawn; the arguments are those of `_drawn`."""
    return _drawn(*numbers)


@lru_cache(64)
def _drawn(
    n: int, n_kv: int, size: int, window: int, of_first: int, of_last: int, causal: bool, count: int,
    seed: int, heads: int | None,
) -> Host:  # fmt: skip
    """All blocks that each block of queries reads, (q_blocks, r) or (heads, q_blocks, r), with random ones drawn."""
    at, total = _centres(n, n_kv, size), -(-n_kv // size)
    low, high = _near(at, window, total)
    count = min(count, total)  # there are no more blocks
    first, last = min(of_first, total), max(total - of_last, 0)
    if causal:
        last = np.minimum(last, at + 1)
    # candidates: the blocks from `first` to the window, and those from the window to `last`
    before = np.maximum(np.minimum(low, last) - first, 0)
    begin = np.maximum(high, first)
    candidates = before + np.maximum(last - begin, 0)
    found = []
    for head in range(heads or 1):
        rng, chosen = generator(seed, head), np.full((len(at), count), -1, np.int64)
        for draw in range(count):
            left = candidates - draw
            pick = np.floor(rng.random(len(at)) * np.maximum(left, 1)).astype(np.int64)
            for other in np.sort(chosen[:, :draw], axis=1).T:  # the pick-th of those that are not chosen yet
                pick += (other >= 0) & (other <= pick)
            chosen[:, draw] = np.where(left > 0, pick, -1)
        block = np.where(chosen < before[:, None], first + chosen, begin[:, None] + chosen - before[:, None])
        found.append(np.where(chosen < 0, -1, block))
    plan = np.stack(found) if heads is not None else found[0]
    listed = _with_random(n, n_kv, size, window, of_first, of_last, plan)
    listed.setflags(write=False)
    return listed


def _with_random(n: int, n_kv: int, size: int, window: int, of_first: int, of_last: int, plan: Any) -> Host:
    """The near, global and random blocks of each block of queries, each block once, −1 for none.

    Of blocks that read all keys, these only where the list has room for all blocks.
    """
    at, total = _centres(n, n_kv, size), -(-n_kv // size)
    near = at[:, None] + np.arange(window) - window // 2
    ends = [*range(min(of_first, total)), *range(max(total - of_last, 0), total)]
    everywhere = np.broadcast_to(np.array(ends, np.int64), (len(at), len(ends)))
    shared = np.concatenate([near, everywhere], axis=1)
    listed = np.concatenate([np.broadcast_to(shared, (*plan.shape[:-2], *shared.shape)), plan], axis=-1)
    listed = np.sort(np.where((listed < 0) | (listed >= total), -1, listed), axis=-1)
    again = np.zeros(listed.shape, bool)
    again[..., 1:] = listed[..., 1:] == listed[..., :-1]
    listed = np.where(again, -1, listed)
    if total <= listed.shape[-1]:
        every = np.arange(listed.shape[-1])
        is_global = (at >= 0) & ((at < of_first) | (at >= total - of_last))
        listed = np.where(is_global[:, None], np.where(every < total, every, -1), listed)
    return listed.astype(np.int32)


def _centres(n: int, n_kv: int, size: int) -> Any:
    return (np.arange(-(-n // size)) * size + n_kv - n) // size


def _near(at: Any, window: int, total: int) -> tuple[Any, Any]:
    """The first near block of each block of queries, and the first block after the near ones."""
    low = np.clip(at - window // 2, 0, total)
    return low, np.clip(at + window // 2 + 1, 0, total)
