"""Clustered attention token by token: a cache of all keys, of which rows read a few.

A chunk of keys is clustered when it is full, and stays as it is. The state holds the clusters of the chunks that are
full, and the keys and values of the open one; its size grows with the sequence.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from subquad.attention.call import AttentionCall
from subquad.attention.key_clusters import KeyClusters
from subquad.attention.query_metric import is_renewed, pooled, query_metric, second_moment, with_own_keys
from subquad.attention.restrictions import NONE
from subquad.attention.window import near_blocks
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.shapes import broadcast_batch
from subquad.core.states import State, StateSpec

if TYPE_CHECKING:
    from subquad.attention.clustered import Clustered

CLUSTERED_STATE = StateSpec(
    {
        "columns": ("clusters · d", "cluster_size"),  # the keys of each cluster
        "members": ("clusters · cluster_size", "d_v"),  # their values
        "means": ("clusters", "d"),
        "spread": ("clusters", "d"),
        "mean_values": ("clusters", "d_v"),
        "counts": ("clusters", 1),
        "keys": ("open", "d"),  # of the chunk that is not full
        "values": ("open", "d_v"),
        "visible": ("open", 1),
        "moment": ("d", "d"),  # of all queries, of each head
        "metric": ("d", "d"),  # of the last chunk that is full
    },
    None,
)


def step(method: Clustered, call: AttentionCall) -> tuple[Array, State]:
    """(output of new tokens, state after them); `call.state` is the state before them, or None."""
    xp, chunk, n = call.xp, method.chunk, call.k.shape[-2]
    state = dict(call.state or _empty(call, method.cluster_size))
    closed, held = _sizes(method, call, state)
    chunks = (held + n) // chunk  # that these tokens fill
    keep = xp.ones((n, 1), dtype=xp.bool, device=place_of(call.k))
    keep = keep if call.key_mask is None else call.key_mask[..., None]
    new = {"keys": call.k, "values": call.v, "visible": xp.astype(keep, call.k.dtype)}
    new = {name: join_rows(xp, state[name], x) for name, x in new.items()}
    own = with_own_keys(call.with_keys(new["keys"], new["values"], new["visible"][..., 0] != 0)).restricted(NONE)

    place = xp.arange(n, dtype=xp.int32, device=place_of(call.k)) + held
    blocks = near_blocks(own, chunk - 1, 0)
    near, found = method.own_chunk(own, own.q, place, blocks), _clusters_of(xp, state)
    moment, metric, first, metrics = state["moment"], state["metric"], 0, []
    for c in range(chunks + 1):
        last = min((c + 1) * chunk - held, n)
        counted = None if call.key_mask is None else call.key_mask[..., first:last]
        moment, first = moment + second_moment(xp, call.q[..., first:last, :], counted), last
        if c < chunks:
            metric = query_metric(xp, pooled(xp, moment, own.k)) if is_renewed(closed + c) else metric
            metrics.append(xp.broadcast_to(metric, (*own.k.shape[:-2], *metric.shape[-2:])))
    if chunks:
        filled = method.close_chunks(own, xp.stack(metrics, axis=-3), begins=closed == 0)
        found = filled if closed == 0 else _joined(xp, found, filled)
    out = method.past_chunks(own, found, own.q, place // chunk + closed, near)[0] if closed + chunks else near[0]
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
        "spread": zeros(*batch, 0, d),
        "mean_values": zeros(*of_values, 0, d_v),
        "counts": zeros(*batch, 0, 1),
        "keys": zeros(*batch, 0, d),
        "values": zeros(*of_values, 0, d_v),
        "visible": zeros(*batch, 0, 1),
        "moment": zeros(*of_queries, d, d),
        "metric": zeros(*batch, d, d),
    }


def _sizes(method: Clustered, call: AttentionCall, state: State) -> tuple[int, int]:
    """(how many chunks are full, how many keys the open one has); ValueError for a state of other options."""
    held, clusters, size = state["keys"].shape[-2], state["means"].shape[-2], method.cluster_size
    d, d_v = call.k.shape[-1], call.v.shape[-1]
    CLUSTERED_STATE.check_sizes(
        "state", state,
        **{"clusters · d": clusters * d, "clusters · cluster_size": clusters * size, "cluster_size": size,
           "clusters": clusters, "open": held, "d": d, "d_v": d_v},
    )  # fmt: skip
    of_chunks = clusters - method.clusters_of_sinks if clusters else 0
    closed, more = divmod(of_chunks, method.clusters_of_chunk)
    if more or of_chunks < 0 or held >= method.chunk:
        msg = (
            f"state holds {clusters} clusters and {held} more keys, which does not fit {method}: "
            f"a state goes on with the options that it began with"
        )
        raise ValueError(msg)
    return closed, held


def _clusters_of(xp: ModuleType, state: State) -> KeyClusters:
    """The clusters that a state holds."""
    counts = xp.astype(state["counts"][..., 0], xp.int32)
    return KeyClusters(
        state["columns"], state["members"], None, counts, state["means"], state["spread"], state["mean_values"]
    )


def _fields_of(xp: ModuleType, found: KeyClusters) -> State:
    """The fields of a state that hold clusters."""
    counts = xp.astype(found.counts, found.means.dtype)[..., None]
    return {"columns": found.k, "members": found.v, "means": found.means, "spread": found.spread,
            "mean_values": found.mean_values, "counts": counts}  # fmt: skip


def _joined(xp: ModuleType, one: KeyClusters, other: KeyClusters) -> KeyClusters:
    """The clusters of both."""
    first, second = (_fields_of(xp, x) for x in (one, other))
    return _clusters_of(xp, {name: join_rows(xp, first[name], second[name]) for name in first})
