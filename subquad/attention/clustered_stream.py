"""Clustered attention with a state: a cache of all keys, of which rows read a few.

The state holds clusters of keys, and the keys and values of the chunk that is open; its size grows with the sequence.
A step clusters a chunk when it is full, and clusters again those of a span that is full (`stretches`); `summarize`
clusters all keys that it gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from subquad.attention.call import AttentionCall
from subquad.attention.cluster_closing import close_chunks, close_keys
from subquad.attention.cluster_parts import own_chunk
from subquad.attention.cluster_spans import stretches
from subquad.attention.key_clusters import KeyClusters, seen_keys
from subquad.attention.query_metric import (
    ChunkMetrics,
    counted_rows,
    is_renewed,
    pooled,
    query_metric,
    second_moment,
    with_own_keys,
)
from subquad.attention.restrictions import NONE
from subquad.attention.window import near_blocks
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.shapes import broadcast_batch
from subquad.core.states import State, StateSpec
from subquad.kernels.clustered_attention import bands_of

if TYPE_CHECKING:
    from subquad.attention.clustered import Clustered

CLUSTERED_STATE = StateSpec(
    {
        "columns": ("clusters · d", "cluster_size"),  # the keys of each cluster
        "members": ("clusters · cluster_size", "d_v"),  # their values
        "means": ("clusters", "d"),
        "spread": ("clusters", "d + bands"),
        "sight": ("clusters", "d"),
        "mean_values": ("clusters", "d_v"),
        "counts": ("clusters", 1),
        "group_means": ("groups", "d"),
        "group_spread": ("groups", "d + bands"),
        "group_values": ("groups", "d_v"),
        "keys": ("open", "d"),  # of the chunk that is not full
        "values": ("open", "d_v"),
        "visible": ("open", 1),
        "moment": ("d", "d"),  # of all queries, of each head
        "metric": ("d", "d"),  # of the last chunk that is full
    },
    None,  # `merge` needs the options of the method
    frozenset({"clusters", "clusters · d", "clusters · cluster_size", "groups", "open"}),
)


def summarize(method: Clustered, call: AttentionCall) -> State:
    """The state of all keys of a call in clusters, in the metric of its queries."""
    xp, own = call.xp, with_own_keys(call)
    state = _empty(call, method.cluster_size)
    moment = second_moment(xp, call.q, counted_rows(call))
    metric = xp.broadcast_to(query_metric(xp, pooled(xp, moment, own.k)), state["metric"].shape)
    state |= {"moment": xp.broadcast_to(moment, state["moment"].shape), "metric": metric}
    if call.k.shape[-2] == 0:
        return state
    found = close_keys(method, xp, own.k, own.v, seen_keys(own), metric, begins=True)
    return state | _fields_of(xp, method.grouped(xp, found))


def merge(method: Clustered, xp: ModuleType, left: State, right: State) -> State:
    """The state of both: the keys of `left` that are open go into clusters, those of `right` stay open."""
    moment = left["moment"] + right["moment"]
    closed = _clusters_of(xp, left)
    if left["keys"].shape[-2]:
        k, v, seen = left["keys"], left["values"], left["visible"][..., 0] != 0
        metric = query_metric(xp, pooled(xp, left["moment"], k))
        begins = left["means"].shape[-2] == 0
        more = close_keys(method, xp, k, v, seen, metric, begins=begins)
        closed = more if begins else _joined(xp, closed, more)
    found = _joined(xp, closed, _clusters_of(xp, right))
    still_open = {name: right[name] for name in ("keys", "values", "visible")}
    metric = query_metric(xp, pooled(xp, moment, found.means))
    return _fields_of(xp, method.grouped(xp, found)) | still_open | {"moment": moment, "metric": metric}


def attend(method: Clustered, call: AttentionCall) -> Array:
    """The output of queries that see all keys of `call.state`."""
    xp, q, state = call.xp, call.q, call.state
    assert state is not None
    _check_sizes(method, q.shape[-1], state["values"].shape[-1], state)
    held, found = state["keys"].shape[-2], _clusters_of(xp, state)
    zero = xp.zeros(q.shape[-2:-1], dtype=xp.int32, device=place_of(q))
    own = call.with_keys(state["keys"], state["values"], state["visible"][..., 0] != 0)
    near = method.read_keys(own.restricted(NONE), q, zero, zero + held, None)
    clusters = found.means.shape[-2]
    return method.read(own, found, q, zero + clusters, near)[0] if clusters else near[0]


def step(method: Clustered, call: AttentionCall) -> tuple[Array, State]:
    """(output of new tokens, state after them); `call.state` is the state before them, or None."""
    xp, chunk, n = call.xp, method.chunk, call.k.shape[-2]
    state = dict(call.state or _empty(call, method.cluster_size))
    held, clusters = _check_sizes(method, call.k.shape[-1], call.v.shape[-1], state)
    closed = max(clusters - method.clusters_of_sinks, 0) // method.clusters_of_chunk
    chunks = (held + n) // chunk  # that these tokens fill
    keep = xp.ones((n, 1), dtype=xp.bool, device=place_of(call.k))
    keep = keep if call.key_mask is None else call.key_mask[..., None]
    new = {"keys": call.k, "values": call.v, "visible": xp.astype(keep, call.k.dtype)}
    new = {name: join_rows(xp, state[name], x) for name, x in new.items()}
    own = with_own_keys(call.with_keys(new["keys"], new["values"], new["visible"][..., 0] != 0)).restricted(NONE)

    place = xp.arange(n, dtype=xp.int32, device=place_of(call.k)) + held
    blocks = near_blocks(own, chunk - 1, 0)
    near, found = own_chunk(method, own, own.q, place, blocks), _clusters_of(xp, state)
    moment, metric, first, metrics = state["moment"], state["metric"], 0, []
    for c in range(chunks + 1):
        last = min((c + 1) * chunk - held, n)
        counted = None if call.key_mask is None else call.key_mask[..., first:last]
        moment, first = moment + second_moment(xp, call.q[..., first:last, :], counted), last
        if c < chunks:
            metric = query_metric(xp, pooled(xp, moment, own.k)) if is_renewed(closed + c) else metric
            metrics.append(xp.broadcast_to(metric, (*own.k.shape[:-2], *metric.shape[-2:])))
    if not (chunks or clusters):
        out = near[0]
    elif not chunks:
        out = method.read(own, found, own.q, xp.zeros_like(place) + clusters, near)[0]
    else:
        of_chunks = ChunkMetrics(xp.stack(metrics, axis=-3), (1,) * chunks)
        filled = close_chunks(method, own, of_chunks, begins=not clusters)
        found = method.grouped(xp, _joined(xp, found, filled) if clusters else filled)
        full = place // chunk
        seen = clusters + full * method.clusters_of_chunk if clusters else method.clusters_before(xp, full)
        outs = []
        fills = call.arrangement.backend.may_fill(call.q, call.k, call.v, *state.values())
        for first, last, some in stretches(method, xp, found, of_chunks, closed, fills):
            found = some
            rows = slice(max(first * chunk - held, 0), min(last * chunk - held, n))
            if rows.start < rows.stop:
                of_near = near[0][..., rows, :], near[1][..., rows]
                outs.append(method.read(own, found, own.q[..., rows, :], seen[..., rows], of_near)[0])
        out = outs[0] if len(outs) == 1 else xp.concat(outs, axis=-2)
    rest = {name: x[..., chunks * chunk :, :] for name, x in (new | {"keys": own.k}).items()}
    return out, _fields_of(xp, found) | rest | {"moment": moment, "metric": metric}


def join_rows(xp: ModuleType, one: Array, other: Array) -> Array:
    """The rows of both, (..., n, width), of their common batch."""
    batch = broadcast_batch(state=one.shape[:-2], tokens=other.shape[:-2])
    return xp.concat([xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (one, other)], axis=-2)


def _empty(call: AttentionCall, size: int) -> State:
    """The state before the first token."""
    xp, k = call.xp, with_own_keys(call).k
    batch, d, d_v = k.shape[:-2], k.shape[-1], call.v.shape[-1]
    of_values = broadcast_batch(k=batch, v=call.v.shape[:-2])
    of_queries = broadcast_batch(q=call.q.shape[:-2], mask=() if call.key_mask is None else call.key_mask.shape[:-1])

    def zeros(*shape: int) -> Array:
        return xp.zeros(shape, dtype=k.dtype, device=place_of(k))

    return {
        "columns": zeros(*batch, 0, size),
        "members": zeros(*of_values, 0, d_v),
        "means": zeros(*batch, 0, d),
        "spread": zeros(*batch, 0, d + bands_of(d)),
        "sight": zeros(*batch, 0, d),
        "mean_values": zeros(*of_values, 0, d_v),
        "counts": zeros(*batch, 0, 1),
        "group_means": zeros(*batch, 0, d),
        "group_spread": zeros(*batch, 0, d + bands_of(d)),
        "group_values": zeros(*of_values, 0, d_v),
        "keys": zeros(*batch, 0, d),
        "values": zeros(*of_values, 0, d_v),
        "visible": zeros(*batch, 0, 1),
        "moment": zeros(*of_queries, d, d),
        "metric": zeros(*batch, d, d),
    }


def _check_sizes(method: Clustered, d: int, d_v: int, state: Mapping[str, Array]) -> tuple[int, int]:
    """(how many keys the open chunk has, how many clusters there are); ValueError for a state of other options."""
    held, clusters, size = state["keys"].shape[-2], state["means"].shape[-2], method.cluster_size
    grouped = max(clusters - method.clusters_of_sinks, 0) // method.group if method.group > 1 else 0
    CLUSTERED_STATE.check_sizes(
        "state", state, groups=grouped,
        **{"clusters · d": clusters * d, "clusters · cluster_size": clusters * size, "cluster_size": size,
           "clusters": clusters, "open": held, "d": d, "d + bands": d + bands_of(d), "d_v": d_v},
    )  # fmt: skip
    if held >= method.chunk:
        msg = f"state has {held} keys in an open chunk, which does not fit {method}: give the chunk that it began with"
        raise ValueError(msg)
    return held, clusters


def _clusters_of(xp: ModuleType, state: Mapping[str, Array]) -> KeyClusters:
    """The clusters that a state holds."""
    counts = xp.astype(state["counts"][..., 0], xp.int32)
    return KeyClusters(
        state["columns"], state["members"], None, counts, state["means"], state["spread"], state["mean_values"],
        state["sight"], (state["group_means"], state["group_spread"], state["group_values"]),
    )  # fmt: skip


def _fields_of(xp: ModuleType, found: KeyClusters) -> State:
    """The fields of a state that hold clusters, with their groups."""
    assert found.groups is not None
    names = ("group_means", "group_spread", "group_values")
    return _members_of(xp, found) | dict(zip(names, found.groups, strict=True))


def _members_of(xp: ModuleType, found: KeyClusters) -> State:
    """The fields of a state that hold clusters."""
    counts = xp.astype(found.counts, found.means.dtype)[..., None]
    assert found.sight is not None
    return {"columns": found.k, "members": found.v, "means": found.means, "spread": found.spread,
            "mean_values": found.mean_values, "sight": found.sight, "counts": counts}  # fmt: skip


def _joined(xp: ModuleType, one: KeyClusters, other: KeyClusters) -> KeyClusters:
    """The clusters of both, with the groups of the first."""
    first, second = _members_of(xp, one), _members_of(xp, other)
    both = {name: join_rows(xp, first[name], second[name]) for name in first}
    groups = one.groups
    if groups is not None:
        of = (both["means"], both["spread"], both["mean_values"])
        a, b, c = (xp.broadcast_to(x, (*y.shape[:-2], *x.shape[-2:])) for x, y in zip(groups, of, strict=True))
        groups = a, b, c
    counts = xp.astype(both.pop("counts")[..., 0], xp.int32)
    k, v, means, spread, mean_values, sight = both.values()
    return KeyClusters(k, v, None, counts, means, spread, mean_values, sight, groups)
