"""Sliding-window attention token by token: a cache of the last keys and of the global ones, of fixed size.

The cache has a slot for each global key of the whole sequence, then slots for the last left · dilation keys, where
global keys are hidden. With the first tokens as global keys it is that of StreamingLLM (Xiao et al., 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from subquad.attention.call import AttentionCall
from subquad.attention.restrictions import NONE, on_host
from subquad.backend import Array
from subquad.core.beside import namespace_of, place_of
from subquad.core.gather import gather_rows
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.core.states import State, StateSpec
from subquad.kernels.block_attention import join

if TYPE_CHECKING:
    from subquad.attention.window import Window

WINDOW_STATE = StateSpec({"keys": ("w", "d"), "values": ("w", "d_v"), "visible": ("w", 1), "place": ("w", 1)}, None)
NEVER = np.iinfo(np.int32).max  # place of a slot that no key takes


def step(window: Window, call: AttentionCall) -> tuple[Array, State]:
    """(output of new tokens, cache after them); `call.state` is the cache before them, or None."""
    if window.global_qkv is not None:
        msg = "step has no form with global_qkv, whose rows are those of a whole sequence"
        raise NotImplementedError(msg)
    xp, n, where = call.xp, call.k.shape[-2], place_of(call.k)
    host, places = _global_places(window, call)
    kept, slots = window.left * window.dilation, 0 if places is None else places.shape[-1]
    batch = broadcast_batch(keys=call.batch_of_keys(), mask=None if places is None else places.shape[:-1])
    state = call.state or _empty(call, batch, slots + kept)
    WINDOW_STATE.check_sizes("state", state, w=slots + kept, d=call.k.shape[-1], d_v=call.v.shape[-1])
    keep = xp.ones(n, dtype=xp.bool, device=where) if call.key_mask is None else call.key_mask
    first = xp.max(state["place"], axis=(-2, -1), keepdims=True) + 1 if slots + kept else 0
    count = xp.astype(xp.arange(n, device=where), call.k.dtype)[:, None]
    new = {
        "keys": call.k,
        "values": call.v,
        "visible": xp.astype(keep, call.k.dtype)[..., None],
        "place": first + count,
    }
    new = {name: xp.broadcast_to(x, (*batch, *x.shape[-2:])) for name, x in new.items()}
    before = {name: xp.broadcast_to(x, (*batch, *x.shape[-2:])) for name, x in state.items()}
    if places is None:
        near = {name: xp.concat([before[name], x], axis=-2) for name, x in new.items()}
        longer = call.with_keys(near["keys"], near["values"], near["visible"][..., 0] != 0).restricted(NONE)
        return window.near(longer)[0], {name: x[..., n:, :] for name, x in near.items()}

    begin = _read_place(first)
    is_global = xp.asarray(_padded(host, begin, n), device=where)
    index = np.where((places >= begin) & (places < begin + n), slots + places - begin, np.arange(slots)).astype(
        np.int32
    )
    order, index = xp.asarray(places, device=where), xp.asarray(index, device=where)
    held = {name: xp.concat([before[name][..., :slots, :], x], axis=-2) for name, x in new.items()}
    held = {name: gather_rows(xp, x, index) for name, x in held.items()}
    new["visible"] = xp.where(is_global[..., None], 0.0, new["visible"])
    near = {name: xp.concat([before[name][..., slots:, :], x], axis=-2) for name, x in new.items()}
    longer = call.with_keys(near["keys"], near["values"], near["visible"][..., 0] != 0).restricted(NONE)
    rows = xp.arange(n, dtype=xp.int32, device=where)
    at_held = window.run(
        call, call.q, held["keys"], held["values"], xp.zeros_like(rows), rows + (begin + 1), None,
        held["visible"][..., 0] != 0, order,
    )  # fmt: skip
    found = join(xp, window.near(longer), at_held)
    if _padded(host, begin, n).any():
        if begin > kept:
            msg = f"a global query at a place from {begin} on sees every key, but the state holds the last {kept} alone"
            raise NotImplementedError(msg)
        stop = rows + (kept + 1)
        whole = window.run(call, call.q, longer.k, longer.v, xp.zeros_like(rows), stop, None, longer.key_mask)
        whole = join(xp, whole, at_held)
        found = tuple(
            xp.where(keep, x, y) for keep, x, y in zip((is_global[..., None], is_global), whole, found, strict=True)
        )
    return found[0], {name: xp.concat([held[name], near[name][..., n:, :]], axis=-2) for name in new}


def _empty(call: AttentionCall, batch: tuple[int, ...], slots: int) -> State:
    """The cache before the first token."""
    widths = {"keys": call.k.shape[-1], "values": call.v.shape[-1], "visible": 1, "place": 1}
    made = {
        name: call.xp.zeros((*batch, slots, width), dtype=call.k.dtype, device=place_of(call.k))
        for name, width in widths.items()
    }
    return made | {"place": made["place"] - 1}


def _global_places(window: Window, call: AttentionCall) -> tuple[Any, Any]:
    """(the global mask, the places of global keys: NEVER for an item that has fewer than others) in NumPy, or None."""
    mask = window.global_mask
    if mask is None:
        return None, None
    window.check_global(call, mask, mask.shape[-1])
    host = on_host(call, mask)
    if host is None:
        msg = "global_mask of a program that is traced has no values; pass it as a constant of the program"
        raise ValueError(msg)
    host = host != 0
    count = host.sum(axis=-1)
    places = np.argsort(~host, axis=-1, kind="stable")[..., : int(count.max(initial=0))]
    return host, np.where(np.arange(places.shape[-1]) < count[..., None], places, NEVER).astype(np.int32)


def _read_place(first: Any) -> int:
    """The place of the first new token as a number."""
    if isinstance(first, int):
        return first
    if not backend_of(namespace_of(first)).is_concrete(first):
        msg = "step with a global_mask reads the place of its tokens from the state, which a traced program cannot"
        raise NotImplementedError(msg)
    return int(first[(0,) * first.ndim]) if 0 not in first.shape else 0


def _padded(host: Any, begin: int, n: int) -> Any:
    """Whether the tokens from place `begin` on are global; tokens after the end of the mask are not."""
    own = host[..., begin : begin + n]
    return np.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, n - own.shape[-1])])
