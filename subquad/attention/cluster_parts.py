"""The rows of a call of clustered attention, part by part: those of a part read the same clusters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from subquad.attention.call import AttentionCall
from subquad.attention.cluster_closing import close_all, close_chunks
from subquad.attention.cluster_spans import stretches
from subquad.attention.key_clusters import KeyClusters
from subquad.attention.query_metric import metrics_of_chunks, with_own_keys
from subquad.attention.restrictions import NONE
from subquad.attention.window import SIZE, near_blocks
from subquad.backend import Array
from subquad.core.block_loop import join_rows
from subquad.core.dtypes import cast
from subquad.core.host import to_host
from subquad.kernels.visibility import plain_sight

if TYPE_CHECKING:
    from subquad.attention.clustered import Clustered

ROWS = 256  # rows of a part are a multiple of this number, which is one of blocks and of tasks of compiled kernels
PART = 2**19  # numbers of the output over near keys that are held at once


class Part(NamedTuple):
    """Rows begin … end − 1 of a call, which read the same clusters."""

    begin: int
    end: int
    clusters: KeyClusters | None
    cluster_of: Array | None = None  # of each key, where rows may have some of those near
    first: int = 0  # the first key near one of the rows
    last: int = 0  # the key after the last one


def read_all(method: Clustered, call: AttentionCall) -> tuple[Array, Array]:
    """(out, lse) of all rows; the sizes of the method lie within the sequences."""
    xp, n = call.xp, call.q.shape[-2]
    place, start, stop = plain_sight(xp, call.q, n, call.k.shape[-2])
    if 0 in (n, call.k.shape[-2]):
        return method.read_keys(call, call.q, start, stop, None)
    backend = call.arrangement.backend
    if not backend.may_fill(call.q, call.k, call.v):
        call = call.widened()
    rows = max(PART // max(math.prod(call.batch()) * call.v.shape[-1], 1) // ROWS, 1) * ROWS
    if not backend.is_concrete(call.q, call.k, call.v):
        rows = n

    def joinable(of_part: tuple[Array, Array]) -> tuple[Array, ...]:
        out, lse = of_part
        return cast(xp, out, call.q.dtype), lse[..., None]  # that of near keys alone is not rounded yet

    def parts() -> Iterator[tuple[Array, ...]]:
        own = with_own_keys(call)
        for part in _parts(method, call, own):
            near = _near_keys(call, part)
            reach = (method.chunk - 1, 0) if call.causal else (method.window, method.window)
            blocks = near_blocks(near, *reach)
            for i in range(part.begin, part.end, rows):
                some = slice(i, min(i + rows, part.end))
                listed = (some.start - part.begin) // SIZE, (some.stop - part.begin + SIZE - 1) // SIZE
                these = None if blocks is None else blocks[..., slice(*listed), :]
                yield joinable(_read_part(method, near, own, part, call.q[..., some, :], place[..., some], these))

    out, lse = join_rows(xp, n, parts())
    return out, lse[..., 0]


def read_rows(method: Clustered, call: AttentionCall, rows: Array, opened: tuple[int, ...]) -> Array:
    """The output (..., len(opened), rows, d_v) of some rows, for several numbers of opened clusters."""
    xp, own, numbers = call.xp, with_own_keys(call), to_host(rows)
    place, _, _ = plain_sight(xp, call.q, call.q.shape[-2], call.k.shape[-2])
    found: list[list[Array]] = []
    for part in _parts(method, call, own):
        begin, end = (int((numbers < x).sum()) for x in (part.begin, part.end))
        if begin == end:
            continue
        some, near = rows[begin:end], _near_keys(call, part)
        q_some = cast(xp, xp.take(call.q, some, axis=-2), call.arrangement.compute)
        of_some = xp.take(place, some, axis=-1)
        found.append(
            [_read_part(replace(method, opened=count), near, own, part, q_some, of_some, None)[0] for count in opened]
        )
    joined = [outs[0] if len(outs) == 1 else xp.concat(outs, axis=-2) for outs in zip(*found, strict=True)]
    return xp.stack([call.arrangement.heads.unfold(out) for out in joined], axis=-3)


def _parts(method: Clustered, call: AttentionCall, own: AttentionCall) -> Iterator[Part]:
    """The rows of a call in parts that read the same clusters; what one has may change with the next one."""
    n, n_kv, chunk = call.q.shape[-2], call.k.shape[-2], method.chunk
    if not call.causal:
        yield Part(0, n, *close_all(method, own), 0, n_kv)
        return
    chunks, ahead = (n_kv - 1) // chunk, n_kv - n
    if chunks == 0:
        yield Part(0, n, None, None, 0, n_kv)
        return
    metrics = metrics_of_chunks(own, chunks, chunk)
    found = close_chunks(method, own, metrics, begins=True)
    fills = call.arrangement.backend.may_fill(call.q, call.k, call.v)
    for first, last, clusters in stretches(method, call.xp, found, metrics, 0, fills):
        stop = min(last * chunk, n_kv)
        begin, end = max(first * chunk - ahead, 0) if first else 0, stop - ahead
        if begin < end:
            yield Part(begin, end, clusters, None, first * chunk, stop)


def _near_keys(call: AttentionCall, part: Part) -> AttentionCall:
    """The call of the rows of a part over the keys that are near one of them; its last row is at its last key."""
    if part.end - part.begin == call.q.shape[-2] and part.last - part.first == call.k.shape[-2]:
        return call
    keys, mask = slice(part.first, part.last), call.key_mask
    k, v = (x[..., keys, :] for x in (call.k, call.v))
    mask = None if mask is None else mask[..., keys]
    return call.with_keys(k, v, mask).with_rows(call.q[..., part.begin : part.end, :], k, {}).restricted(NONE)


def own_chunk(
    method: Clustered, call: AttentionCall, q: Array, place: Array, blocks: Array | None
) -> tuple[Array, Array]:
    """(out, lse) of causal rows over the keys of their own chunk, which begins at a multiple of `chunk`."""
    start = call.xp.maximum(place, call.xp.zeros_like(place)) // method.chunk * method.chunk
    return method.read_keys(call, q, start, place + 1, blocks)


def _read_part(
    method: Clustered, near: AttentionCall, own: AttentionCall, part: Part, q: Array, place: Array, blocks: Array | None
) -> tuple[Array, Array]:
    """(out, lse) of rows q of a part at these places, which read the listed blocks of its near keys."""
    xp = own.xp
    if own.causal:
        of_near = own_chunk(method, near, q, place - part.first, blocks)
        if part.clusters is None:
            return of_near
        return method.read(own, part.clusters, q, method.clusters_before(xp, place // method.chunk), of_near)
    of_near = method.read_keys(near, q, place - method.window, place + method.window + 1, blocks)
    assert part.clusters is not None
    stop = xp.zeros_like(place) + part.clusters.counts.shape[-1]
    return method.read(own, part.clusters, q, stop, of_near, (part.clusters.order, place, part.cluster_of))
