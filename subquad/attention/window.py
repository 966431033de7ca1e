"""Sliding-window attention with global keys (Longformer).

    out = softmax(s q kᵀ, over the keys within the window of a row and over global keys) v

O(n (left + right) (d + d_v)) time; extra memory does not grow with n.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from subquad.attention.call import ArrayOptions, AttentionCall
from subquad.attention.checks import check_mask
from subquad.attention.method import Method
from subquad.attention.rest import check_rest
from subquad.attention.restrictions import NONE, by_documents, on_host, sight_of
from subquad.attention.window_rest import blocks_of_windows, check_left, count_of_blocks, over_rest
from subquad.attention.window_stream import WINDOW_STATE, step
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_arrays, check_count, check_floating, check_given
from subquad.core.dtypes import cast
from subquad.core.gather import gather, gather_rows
from subquad.core.shapes import check_mask_axes
from subquad.core.states import State
from subquad.kernels.block_attention import block_attention, join
from subquad.kernels.visibility import Sight, narrowed
from subquad.registry import register

SIZE = 64  # rows and keys of a block
Parts = tuple[Array, Array]  # output and log-sum-exp


@register(
    "window",
    aliases=("longformer",),
    cost="n (left + right) (d + d_v)",
    size="left",
    defaults=({"left": 64}, {"left": 256}),
)
@dataclass(frozen=True, repr=False, eq=False)
class Window(Method):
    """Sliding-window attention: a query sees the keys near its place, and global keys.

    Parameters
    ----------
    left : int, default 256
        How many keys before its own place a query sees.
    right : int, optional
        How many keys after its own place a query sees. Default: `left`, and 0 in causal calls, where any other number
        raises ValueError.
    dilation : int, default 1
        Distance between the keys of a window: a query at place p sees the keys p + t · dilation for −left ≤ t ≤ right.
        Other than 1, it cannot be joined with `visible` or a pair of `segments`.
    global_mask : array of bool, broadcastable to (..., n_kv), optional
        True = every query sees this key. In self-attention (n = n_kv) a query with this place sees every key. Causality
        and `segments` are kept to by global keys and queries too. The values must be readable: under a tracer the mask
        must be a constant.
    global_qkv : tuple of three arrays, optional
        Queries, keys and values of the shapes of q, k and v, which the rows of global queries use in place of q, k and
        v (Longformer's separate projections).
    rest : {None, "centroids"}, default None
        What becomes of the keys that a query does not visit: None, they have no weight; "centroids", they enter as
        centroids of clusters (see Notes). Needs ``dilation=1``, and in causal calls ``left ≥ rest_size − 1``; it cannot
        be joined with `visible`, nor `segments` with a `global_mask`.
    rest_size : int, optional
        Keys of a cluster; ValueError without `rest`. Default: 16.
    implementation : str, default "auto"
        "auto" takes the first override of the library's backend that accepts the call, "generic" the form in plain
        Array API. The name of an override forces that override: ValueError, with the reasons, if it cannot take a call.

    Notes
    -----
    The place of query i is i + n_kv − n: queries and keys are aligned at their ends; with `segments`, at the ends of
    each document. Counts exclude the query's own place. Other libraries count otherwise:

    ==============================================  =======================================
    convention                                      fields
    ==============================================  =======================================
    allenai/longformer, w on each side              left=w
    transformers, ``attention_window`` w (even)     left=w // 2
    flash-attention, ``window_size=(l, r)``         left=l, right=r
    tokens with the query itself, w (fla, causal)   left=w - 1, causal=True
    ==============================================  =======================================

    With ``rest="centroids"``, keys are clustered by content within chunks of 256 consecutive keys or, in causal calls,
    of no more than left + 1. A cluster of which a query visits all but n keys enters its softmax with the value v̄ and
    the weight exp(s q·μ + s² Σ_l q_l² σ²_l / 4 + log n), for the mean μ, the variances σ² and the mean value v̄ of all
    its keys. One key out of 64, at least one of each chunk, that of the smallest norm, is a cluster of its own. Each
    key counts once, and all weights are positive. Which keys lie together is constant for gradients. O(n² / rest_size)
    time and O(n) memory; `step` raises NotImplementedError. Kernels: `balanced_tree`, `cluster_members`,
    `cluster_spread`, `centroid_attention`.

    `step` keeps the last left · dilation keys and all global ones, whose places `global_mask` gives for the whole
    sequence; a global query after more tokens than these raises NotImplementedError, since it sees every key, and so
    does `global_qkv`. Kernel: `block_attention`.

    References
    ----------
    .. [1] I. Beltagy et al., "Longformer", 2020, section 3.1.
    .. [2] A. Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", 2024: keys of a
       small norm draw much weight.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q = k = np.zeros((4, 2))
    >>> subquad.attention(q, k, np.arange(4.0)[:, None], "window", left=1)[:, 0]
    array([0.5, 1. , 2. , 2.5])
    """

    restrictions = frozenset({"segments", "visible", "return_lse"})
    reads = restrictions
    state = WINDOW_STATE

    left: int = 256
    right: int | None = None
    dilation: int = 1
    global_mask: Array | None = None
    global_qkv: tuple[Array, Array, Array] | None = None
    rest: str | None = None
    rest_size: int | None = None
    implementation: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("left", self.left, least=0)
        check_count("dilation", self.dilation)
        if self.right is not None:
            check_count("right", self.right, least=0)
        check_rest(self.rest, self.rest_size)
        if self.rest is not None and self.dilation != 1:
            msg = f"dilation={self.dilation} beside rest: the keys between those of the window belong to none; pass 1"
            raise NotImplementedError(msg)
        if self.global_qkv is not None:
            if not isinstance(self.global_qkv, tuple) or len(self.global_qkv) != 3:
                is_tuple = isinstance(self.global_qkv, tuple)
                got = f"a tuple of {len(self.global_qkv)}" if is_tuple else type(self.global_qkv).__name__
                msg = f"global_qkv must be a tuple of three arrays, for q, k and v, got {got}"
                raise TypeError(msg)
            check_given(**{f"global_qkv[{i}]": x for i, x in enumerate(self.global_qkv)})
            if self.global_mask is None:
                msg = "global_qkv would have no effect without global_mask, which says where they are used"
                raise ValueError(msg)

    def _reads_half(self, *, streaming: bool = False) -> bool:
        # outputs that are joined must not be rounded before
        return not streaming and self.rest is None and self.global_mask is None

    def _evaluate(self, call: AttentionCall) -> Array:
        return self._evaluate_with_lse(call.restricted(NONE))[0]

    def _evaluate_with_lse(self, call: AttentionCall) -> Parts:
        if self.rest is not None:
            if call.causal:
                check_left(self.left, self.rest_size)
            if call.restrictions.segments is not None or call.restrictions.visible is not None:
                return self._by_documents(call)
        if self.global_mask is None:
            return self._near_and_rest(call, call.key_mask)
        mask = self._global_mask(call)
        found = self._near_and_rest(call, ~mask if call.key_mask is None else call.key_mask & ~mask)
        index, exists = _places(call, self.global_mask)
        if index is None:
            return found
        found = join(call.xp, found, self._at_global_keys(call, index, exists))
        return found if call.q.shape[-2] != call.k.shape[-2] else self._global_rows(call, mask, index, found)

    def _near_and_rest(self, call: AttentionCall, key_mask: Array | None) -> Parts:
        """(out, lse) over the keys that `key_mask` shows: those of the window, and the rest if it counts."""
        found = self.near(call, key_mask)
        if self.rest is None:
            return found
        right = self._right(causal=call.causal)
        rest = over_rest(call, self.left, right, key_mask, self.rest_size, self.implementation)
        return found if rest is None else join(call.xp, found, rest)

    def _by_documents(self, call: AttentionCall) -> Parts:
        """(out, lse) with the rest, which is that of each document alone."""
        if call.restrictions.visible is not None:
            msg = "visible beside rest: a row may see a part of a chunk of keys alone; leave one of them out"
            raise NotImplementedError(msg)
        if self.global_mask is not None:
            msg = "segments beside global_mask and rest: call the method once for each document, or leave one out"
            raise NotImplementedError(msg)

        def evaluate(own: AttentionCall) -> Array:
            out, lse = self._evaluate_with_lse(own.restricted(NONE))
            return own.xp.concat([out, lse[..., None]], axis=-1)

        joined = by_documents(call, evaluate)
        return joined[..., :-1], joined[..., -1]

    def near(self, call: AttentionCall, key_mask: Array | None = None) -> Parts:
        """(out, lse) over the keys of the window that `key_mask`, by default the call's, shows."""
        xp, key_mask = call.xp, call.key_mask if key_mask is None else key_mask
        right = self._right(causal=call.causal)
        own = call.restrictions
        is_aligned = own.visible is None and (own.segments is None or own.segments[0] is own.segments[1])
        if self.dilation == 1:
            _, start, stop = sight_of(call, left=self.left, right=right)
            blocks = near_blocks(call, self.left, right) if is_aligned else None
            is_only = self.global_mask is self.rest is None
            return self.run(call, call.q, call.k, call.v, start, stop, blocks, key_mask, is_only=is_only)
        if not is_aligned:
            msg = "a window with a dilation counts from the places of rows, which visible and pairs of segments move"
            raise NotImplementedError(msg)
        # keys of one residue modulo the dilation are a sequence of their own, with a window without dilation
        step, n, n_kv = self.dilation, call.q.shape[-2], call.k.shape[-2]
        holds = call.arrangement.backend.holds
        if holds(step > n) and holds(step > n_kv):  # each key is a sequence of its own, whatever the dilation
            step = max(n, n_kv, 1)
        early, lacking = -n % step, -n_kv % step
        q, k, v = (_by_residue(xp, x, step) for x in (call.q, call.k, call.v))
        mask = None if key_mask is None else _by_residue(xp, key_mask[..., None], step)[..., 0]
        if mask is None and lacking:
            mask = _by_residue(xp, xp.ones((n_kv, 1), dtype=xp.bool, device=place_of(call.k)), step)[..., 0]
        residue = xp.arange(step, dtype=xp.int32, device=place_of(call.q))[:, None]
        place, start, stop = (_by_residue(xp, (x + lacking)[..., None], step)[..., 0] for x in sight_of(call))
        inner = Sight((place - residue) // step, -((residue - start) // step), -((residue - stop) // step))
        _, start, stop = narrowed(xp, inner, left=self.left, right=right)
        out, lse = self.run(call, q, k, v, start, stop, None, mask)
        return _joined(xp, out)[..., early:, :], _joined(xp, lse[..., None])[..., early:, 0]

    def run(
        self, call: AttentionCall, q: Array, k: Array, v: Array, start: Array, stop: Array, blocks: Array | None,
        key_mask: Array | None, place: Array | None = None, is_only: bool = False,
    ) -> Parts:  # fmt: skip
        """(out, lse) over the keys within an interval, by the kernel, which a call may need only once."""
        attend = partial(call.run, self, block_attention) if is_only else block_attention
        return attend(
            q, k, v, start, stop, blocks, place, *[None] * 5, scale=call.scale, size=SIZE, key_mask=key_mask,
            implementation=self.implementation,
        )  # fmt: skip

    def _at_global_keys(self, call: AttentionCall, index: Array, exists: Array) -> Parts:
        """(out, lse) of all queries over the global keys."""
        xp = call.xp
        _, start, stop = sight_of(call)
        keep = exists if call.key_mask is None else exists & gather(xp, call.key_mask, index)
        k, v = (gather_rows(xp, x, index) for x in (call.k, call.v))
        return self.run(call, call.q, k, v, start, stop, None, keep, index)

    def _global_rows(self, call: AttentionCall, mask: Array, index: Array, found: Parts) -> Parts:
        """(out, lse) with the rows of global queries, which see every key, put in their places."""
        xp, given = call.xp, call.options
        q, k, v = (given.get(f"global_{name}", getattr(call, name)) for name in ("q", "k", "v"))
        sight = sight_of(call)
        _, start, stop = (gather(xp, x, index) for x in sight)
        rows = self.run(call, gather_rows(xp, q, index), k, v, start, stop, None, call.key_mask)
        rank = xp.cumulative_sum(xp.astype(mask, xp.int32), axis=-1) - 1
        rank = xp.astype(xp.where(mask, rank, 0), index.dtype)
        out = xp.where(mask[..., None], gather_rows(xp, rows[0], rank), found[0])
        return out, xp.where(mask, gather(xp, rows[1], rank), found[1])

    def _step(self, call: AttentionCall) -> tuple[Array, State]:
        if self.rest is not None:
            msg = "step has no form with rest: the state holds the last keys alone; leave rest out"
            raise NotImplementedError(msg)
        return step(self, call)

    def _right(self, *, causal: bool) -> int:
        if causal and self.right:
            msg = f"right={self.right} would show later keys in a causal call; leave right out, or pass 0"
            raise ValueError(msg)
        if self.right is not None:
            return self.right
        return 0 if causal else self.left

    def _global_mask(self, call: AttentionCall) -> Array:
        """The option `global_mask`, checked and folded, and beside it the shapes of `global_qkv`."""
        mask = self.check_global(call, self.global_mask, call.k.shape[-2])
        for name, own in call.options.items():
            rows = getattr(call, name.removeprefix("global_"))
            if own.shape[-2:] != rows.shape[-2:]:
                n, d = rows.shape[-2:]
                msg = f"{name} of global_qkv has shape {tuple(own.shape)}, expected (..., {n}, {d})"
                raise ValueError(msg)
        return mask

    def check_global(self, call: AttentionCall, mask: Array, n: int) -> Array:
        """The option `global_mask`, (..., n), checked and folded."""
        check_arrays(q=call.q, global_mask=mask)
        mask = check_mask(call.xp, "global_mask", mask, n, "keys")
        heads = call.arrangement.heads
        check_mask_axes("global_mask", mask, heads.unfold(call.q).shape[:-2])
        mask = heads.fold(mask, tail=1)
        call.batch(global_mask=mask.shape[:-1])
        return mask

    def why_no_matrix(self) -> str | None:
        if self.global_qkv is None:
            return None
        return "weights of a window with global_qkv multiply two arrays of values; leave global_qkv out"

    def _holds_arrays(self, *, streaming: bool = False) -> bool:
        return self.global_qkv is not None and not streaming

    def _array_options(self, xp: ModuleType, like: Array) -> ArrayOptions:
        assert self.global_qkv is not None
        names = "global_q", "global_k", "global_v"
        given = dict(zip(names, self.global_qkv, strict=True))
        check_arrays(q=like, **given)
        check_floating(xp, **given)
        return {name: cast(xp, x, like.dtype) for name, x in given.items()}

    def _in_force(self) -> dict[str, Any]:
        return {name: x for name, x in super()._in_force().items() if x is not None}


def near_blocks(call: AttentionCall, left: int, right: int) -> Array | None:
    """The key blocks that each block of rows reads; None where a list would be no shorter than all keys."""
    n, n_kv, holds = call.q.shape[-2], call.k.shape[-2], call.arrangement.backend.holds
    count = count_of_blocks(call, left, right, SIZE)
    if not holds(n_kv > 2 * count * SIZE) or not holds(n > SIZE):
        return None
    return blocks_of_windows(call, left, right, SIZE)


def _by_residue(xp: ModuleType, x: Array, step: int) -> Array:
    """Rows (..., n, width) by their residue modulo `step`, (..., step, ⌈n / step⌉, width), with zeros before them."""
    lacking = -x.shape[-2] % step
    if lacking:
        zeros = xp.zeros((*x.shape[:-2], lacking, x.shape[-1]), dtype=x.dtype, device=place_of(x))
        x = xp.concat([zeros, x], axis=-2)
    x = xp.reshape(x, (*x.shape[:-2], x.shape[-2] // step, step, x.shape[-1]))
    return _swapped(xp, x)


def _joined(xp: ModuleType, x: Array) -> Array:
    """The rows of all residues in their order, the inverse of `_by_residue` but for the zeros."""
    x = _swapped(xp, x)
    return xp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))


def _swapped(xp: ModuleType, x: Array) -> Array:
    """The axes −3 and −2 swapped, not by `moveaxis`, which PyTorch's `vmap` does not know."""
    return xp.permute_dims(x, (*range(x.ndim - 3), x.ndim - 2, x.ndim - 3, x.ndim - 1))


def _places(call: AttentionCall, mask: Array) -> tuple[Array | None, Any]:
    """(places of the True entries of each item, which of them exist); (None, None) if there is none."""
    host = on_host(call, mask)
    if host is None:
        msg = "global_mask of a program that is traced has no values; pass it as a constant of the program"
        raise ValueError(msg)
    host = np.broadcast_to(host != 0, (*host.shape[:-1], call.k.shape[-2]))
    count = host.sum(axis=-1)
    most = int(count.max(initial=0))
    if most == 0:
        return None, None
    index = np.argsort(~host, axis=-1, kind="stable")[..., :most].astype(np.int32)
    where = place_of(call.q)
    exists = np.arange(most) < count[..., None]
    return call.xp.asarray(index, device=where), call.xp.asarray(exists, device=where)
