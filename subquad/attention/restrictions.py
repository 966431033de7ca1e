"""Restrictions of a call beyond causality and masks: packed documents, counts of visible keys, changes of logits.

`restrict` checks them and returns the call with them. A method reads `call.restrictions`, or sees one document, or the
keys up to one frontier, at a time: `by_documents`, `by_frontiers`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from subquad.attention.call import AttentionCall
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_arrays, check_floating, check_positive
from subquad.core.dtypes import cast, is_dtype
from subquad.core.host import to_host
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch, check_mask_axes
from subquad.core.states import State
from subquad.kernels.visibility import Sight, document_sight, frontier_sight, intersection, narrowed, plain_sight

NAMES = ("segments", "visible", "return_lse", "mask", "bias", "softcap", "sinks")


class Restrictions(NamedTuple):
    """The restrictions of a call, checked, with grouped heads folded as in `AttentionCall`."""

    segments: tuple[Array, Array] | None = None  # integers (..., n) and (..., n_kv), of one batch shape
    visible: Array | None = None  # int32 (..., n)
    mask: Array | None = None  # bool (..., n, n_kv)
    bias: Array | None = None  # (..., n, n_kv)
    softcap: float | None = None
    sinks: Array | None = None  # (..., 1, 1)
    # the same numbers in NumPy, if they can be read: where a program is traced, work on constants is traced too
    segments_on_host: tuple[Any, Any] | None = None
    visible_on_host: Any = None


NONE = Restrictions()


def restrict(
    call: AttentionCall, *, segments: Any = None, visible: Any = None, mask: Any = None, bias: Any = None,
    softcap: Any = None, sinks: Any = None,
) -> AttentionCall:  # fmt: skip
    """The call with these restrictions, checked: TypeError and ValueError name the argument."""
    xp, heads, (n, n_kv) = call.xp, call.arrangement.heads, (call.q.shape[-2], call.k.shape[-2])
    batches = [heads.unfold(x).shape[:-2] for x in (call.q, call.k)]
    like = call.q
    numbers, numbers_on_host = (None, None) if segments is None else _segments(call, segments, batches)
    counts = None
    if visible is not None:
        if call.causal:
            msg = "visible counts the keys that each query sees, and causal=True counts them too; leave one out"
            raise ValueError(msg)
        visible, counts = _counts(call, visible, batches[0])
    for name, x, kind, words in (("mask", mask, "bool", "bool with True = keep"), ("bias", bias, "", "")):
        if x is None:
            continue
        check_arrays(q=like, **{name: x})
        if kind and not is_dtype(xp, x.dtype, kind):
            msg = f"{name} has dtype {x.dtype}, expected {words}; an additive mask is passed as bias"
            raise TypeError(msg)
        if x.ndim < 2 or x.shape[-2] not in (1, n) or x.shape[-1] not in (1, n_kv):
            msg = (
                f"{name} has shape {tuple(x.shape)}, expected (..., {n}, {n_kv}): queries × keys; "
                f"what hides keys from all queries is key_mask"
            )
            raise ValueError(msg)
        if name == "mask":  # the first axis of a bias is that of heads by convention
            check_mask_axes(name, x, *batches, tail=2)
    if bias is not None:
        check_floating(xp, bias=bias)
        bias = cast(xp, bias, like.dtype)
    mask, bias = (None if x is None else heads.fold(xp.broadcast_to(x, (*x.shape[:-2], n, n_kv))) for x in (mask, bias))
    call.batch(**{name: x.shape[:-2] for name, x in (("mask", mask), ("bias", bias)) if x is not None})
    if sinks is not None:
        check_arrays(q=like, sinks=sinks)
        check_floating(xp, sinks=sinks)
        own = cast(xp, sinks, like.dtype)
        assert own is not None
        sinks = heads.fold(own[..., None, None])
        call.batch(sinks=sinks.shape[:-2])
    bound = None if softcap is None else check_positive("softcap", softcap)
    return call.restricted(Restrictions(numbers, visible, mask, bias, bound, sinks, numbers_on_host, counts))


def sight_of(call: AttentionCall, *, left: int | None = None, right: int | None = None) -> Sight:
    """What each query sees: its document, or the keys up to its count, or all; in causal calls no later key.

    `left` and `right` limit the number of keys before and after its place.
    """
    xp, given = call.xp, call.restrictions
    right = 0 if call.causal else right
    if given is None or (given.segments is None and given.visible is None):

        def sight_of_all() -> Sight:
            return plain_sight(xp, call.q, call.q.shape[-2], call.k.shape[-2], left=left, right=right)

        return call.made_of(call.arrangement.owner(), f"sight {left} {right}", None, sight_of_all)
    sight: Any = None
    if given.segments is not None:
        of_queries, of_keys = given.segments
        sight = document_sight(xp, of_queries, of_keys, place_of(call.q))
    if given.visible is not None:
        by_count = frontier_sight(xp, given.visible)
        sight = by_count if sight is None else intersection(xp, by_count, sight)
    return narrowed(xp, sight, left, right)


def by_documents(call: AttentionCall, evaluate: Callable[[AttentionCall], Array]) -> Array:
    """The output of a method that sees one document at a time; the numbers of the documents must be readable."""
    known = call.restrictions.segments_on_host
    if known is None:
        msg = (
            "segments of a program that is traced have no values, and this method needs the lengths of the documents: "
            "pass segments as constants, or use 'exact' or 'window'"
        )
        raise NotImplementedError(msg)

    def of_item(call: AttentionCall, queries: Any, keys: Any) -> Array:
        spans_q, spans_k = _spans(queries), _spans(keys)
        parts = []
        for number, (first, last) in spans_q.items():
            own = call.part(queries=slice(first, last), keys=slice(*spans_k.get(number, (0, 0))))
            parts.append(call.leave_rows(evaluate(own), last - first))
        if not parts:
            return evaluate(call.part(queries=slice(0, 0), keys=slice(0, 0)))
        return parts[0] if len(parts) == 1 else call.xp.concat(parts, axis=-2)

    of_queries, of_keys = known
    return _item_by_item(call.restricted(NONE), of_queries, of_keys, of_item)


def by_frontiers(
    call: AttentionCall,
    summarize: Callable[[AttentionCall], State],
    merge: Callable[[State, State], State],
    attend: Callable[[AttentionCall], Array],
) -> Array:
    """The output of a method with a state, for queries that see the first `visible[i]` keys each."""
    visible = call.restrictions.visible_on_host
    if visible is None:
        msg = "visible of a program that is traced has no values, which this method needs: use 'exact' or 'window'"
        raise NotImplementedError(msg)

    def of_item(call: AttentionCall, counts: Any, _: Any) -> Array:
        state, done, parts = summarize(call.part(keys=slice(0, 0))), 0, []
        for count, (first, last) in _spans(counts).items():
            if count > done:
                state, done = merge(state, summarize(call.part(keys=slice(done, count)))), count
            out = attend(call.part(queries=slice(first, last), state=state))
            parts.append(call.leave_rows(out, last - first))
        if not parts:
            return attend(call.part(queries=slice(0, 0), state=state))
        return parts[0] if len(parts) == 1 else call.xp.concat(parts, axis=-2)

    return _item_by_item(call.restricted(NONE), visible, visible, of_item)


def _item_by_item(call: AttentionCall, of_queries: Any, of_keys: Any, evaluate: Callable[..., Array]) -> Array:
    """`evaluate(call, numbers, numbers)` for each item of the batch of the numbers; the outputs in one array."""
    for axis in range(-of_queries.ndim, -1):
        size = of_queries.shape[axis]
        if size > 1:
            numbers = ((np.take(of_queries, [i], axis), np.take(of_keys, [i], axis)) for i in range(size))
            outs = [_item_by_item(call.items(axis, i, i + 1), *own, evaluate) for i, own in enumerate(numbers)]
            return call.xp.concat(outs, axis=axis - 1)
    if 0 in of_queries.shape[:-1]:  # of no items there are no documents: the shape of the output is that of any
        of_queries, of_keys = (np.zeros(x.shape[-1:], np.int64) for x in (of_queries, of_keys))
    return evaluate(call, of_queries.reshape(-1), of_keys.reshape(-1))


def _spans(numbers: Any) -> Mapping[int, tuple[int, int]]:
    """Number → (first, stop) of the places where it stands."""
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)] if len(numbers) else [0]
    return {int(numbers[a]): (a, b) for a, b in itertools.pairwise(edges)}


def _integers(name: str, x: Any, call: AttentionCall, n: int, batch: tuple[int, ...]) -> Array:
    """An integer array (..., n); TypeError and ValueError name it."""
    xp = call.xp
    check_arrays(q=call.q, **{name: x})
    if not is_dtype(xp, x.dtype, "integral"):
        msg = f"{name} has dtype {x.dtype}, expected integers"
        raise TypeError(msg)
    if x.ndim == 0 or x.shape[-1] != n:
        msg = f"{name} has shape {tuple(x.shape)}, expected (..., {n})"
        raise ValueError(msg)
    check_mask_axes(name, x, batch)
    broadcast_batch(q=batch, **{name: x.shape[:-1]})
    return x


def on_host(call: AttentionCall, x: Array) -> Any:
    """An array (..., n) in NumPy, with grouped heads folded; None if it cannot be read."""
    if not backend_of(call.xp).is_concrete(x):
        return None
    return replace(call.arrangement.heads, xp=np).fold(to_host(x), tail=1)


def _segments(
    call: AttentionCall, segments: Any, batches: list[tuple[int, ...]]
) -> tuple[tuple[Array, Array], tuple[Any, Any] | None]:
    """The numbers of the documents of queries and of keys, of one batch shape, folded; in NumPy too."""
    xp, n, n_kv = call.xp, call.q.shape[-2], call.k.shape[-2]
    if isinstance(segments, tuple | list):
        if len(segments) != 2:
            kind = type(segments).__name__
            msg = f"segments is a {kind} of {len(segments)}, expected one array, or one for q and one for k"
            raise TypeError(msg)
        names = "segments[0]", "segments[1]"
    else:
        if n != n_kv:
            msg = f"segments is one array, but q has {n} rows and k has {n_kv}; pass a pair, for q and for k"
            raise ValueError(msg)
        segments, names = (segments, segments), ("segments", "segments")
    made, hosts = [], []
    for x, name, count, batch in zip(segments, names, (n, n_kv), batches, strict=True):
        own = _integers(name, x, call, count, batch)
        host = on_host(call, own)
        if host is not None:
            changes, kinds = (np.sum(y[..., 1:] != y[..., :-1]) for y in (host, np.sort(host, axis=-1)))
            if changes != kinds:
                msg = f"{name} has a number that comes back after another one; the rows of a document must lie together"
                raise ValueError(msg)
        made.append(call.arrangement.heads.fold(own, tail=1))
        hosts.append(host)
    batch = broadcast_batch(**{"segments[0]": made[0].shape[:-1], "segments[1]": made[1].shape[:-1]})

    def spread(xp: Any, arrays: list[Any]) -> Any:
        of_queries, of_keys = (xp.broadcast_to(x, (*batch, x.shape[-1])) for x in arrays)
        return of_queries, of_keys

    known = None if any(x is None for x in hosts) else spread(np, hosts)
    return (made[0], made[0]) if segments[0] is segments[1] else spread(xp, made), known


def _counts(call: AttentionCall, visible: Any, batch: tuple[int, ...]) -> tuple[Array, Any]:
    """The numbers of keys that queries see, int32, in 0 … n_kv and non-decreasing if they can be read; in NumPy too."""
    xp, n_kv = call.xp, call.k.shape[-2]
    x = _integers("visible", visible, call, call.q.shape[-2], batch)
    host = on_host(call, x)
    if host is not None and host.size:
        least, most = int(host.min()), int(host.max())
        if least < 0 or most > n_kv:
            msg = f"visible has numbers from {least} to {most}, expected numbers of keys, 0 to {n_kv}"
            raise ValueError(msg)
        if np.any(host[..., 1:] < host[..., :-1]):
            msg = "visible decreases from one query to the next; a later query sees at least as many keys"
            raise ValueError(msg)
    return call.arrangement.heads.fold(xp.astype(x, xp.int32), tail=1), host
