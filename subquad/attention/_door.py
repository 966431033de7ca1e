"""The door of every attention method: checks, grouped queries, dtypes; and the way out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from subquad import _arrays
from subquad._dispatch import Array
from subquad.attention._heads import Heads, counts, find_heads


@dataclass(frozen=True)
class Inputs:
    """Checked inputs, in the compute dtype, with grouped queries on an axis of their own.

    Grouped: q (..., h_kv, g, n, d), k and v (..., h_kv, 1, n_kv, ·), key_mask (..., h_kv or 1, g or 1, n_kv).
    """

    xp: ModuleType
    q: Array
    k: Array
    v: Array
    key_mask: Array | None
    causal: bool
    scale: float
    heads: Heads
    leave: Callable[[Array], Array]


def enter(q: Array, k: Array, v: Array, *, causal: bool, key_mask: Array | None, scale: float | None) -> Inputs:
    _arrays.check_given(q=q, k=k, v=v)
    xp = _arrays.check_arrays(q=q, k=k, v=v, key_mask=key_mask)
    _arrays.check_floating(xp, q=q, k=k, v=v)
    causal = _arrays.check_flag("causal", causal)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, x)
    d = check_widths(q, k)
    scale = check_scale(scale, d)
    key_mask = check_keys(k, v, key_mask, xp)
    heads = find_heads(xp, counts(k, v), counts(q))
    q, k, v, key_mask = heads.fold(q), heads.fold(k), heads.fold(v), heads.fold_mask(key_mask)
    mask_batch = None if key_mask is None else key_mask.shape[:-1]
    batch = _arrays.broadcast_batch(q=q.shape[:-2], k=k.shape[:-2], v=v.shape[:-2], key_mask=mask_batch)
    dtype = xp.result_type(q, k, v)
    compute = _arrays.compute_dtype(xp, q, k, v)
    q, k, v = (_arrays.cast(xp, x, compute) for x in (q, k, v))
    shape = (*batch, q.shape[-2], v.shape[-1])

    def leave(out: Array) -> Array:
        out = _arrays.cast(xp, out, dtype)
        if tuple(out.shape) != shape:
            out = xp.broadcast_to(out, shape)
        return heads.unfold(out)

    return Inputs(xp, q, k, v, key_mask, causal, scale, heads, leave)


def check_widths(q: Array, k: Array) -> int:
    d = q.shape[-1]
    if k.shape[-1] != d:
        msg = f"q has {d} channels (last axis of {tuple(q.shape)}) but k has {k.shape[-1]} ({tuple(k.shape)})"
        raise ValueError(msg)
    if d == 0:
        msg = f"q has no channels: shape {tuple(q.shape)}, expected (..., n, d) with d ≥ 1"
        raise ValueError(msg)
    return int(d)


def check_scale(scale: Any, d: int) -> float:
    if scale is None:
        return float(d) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.floating | np.integer):
        msg = f"scale must be a number, got {type(scale).__name__}; to scale by an array, multiply q by it"
        raise TypeError(msg)
    if not math.isfinite(scale):
        msg = f"scale must be finite, got {scale}"
        raise ValueError(msg)
    return float(scale)


def check_keys(k: Array, v: Array, key_mask: Array | None, xp: ModuleType) -> Array | None:
    """The mask with one entry for each key."""
    if v.shape[-2] != k.shape[-2]:
        msg = (
            f"k has {k.shape[-2]} rows (axis −2 of {tuple(k.shape)}) but v has {v.shape[-2]} "
            f"({tuple(v.shape)}); every key needs one value"
        )
        raise ValueError(msg)
    if key_mask is None:
        return None
    if not _arrays.is_dtype(xp, key_mask, "bool"):
        msg = (
            f"key_mask has dtype {key_mask.dtype}, expected bool with True = keep; "
            f"an additive mask becomes one by `mask == 0`, a 0/1 mask by `mask == 1`"
        )
        raise TypeError(msg)
    if key_mask.ndim == 0 or key_mask.shape[-1] not in (1, k.shape[-2]):
        msg = (
            f"key_mask has shape {tuple(key_mask.shape)}, expected (..., {k.shape[-2]}): "
            f"its last axis runs over the keys (a mask over queries × keys is not supported)"
        )
        raise ValueError(msg)
    if key_mask.shape[-1] == k.shape[-2]:
        return key_mask
    return xp.broadcast_to(key_mask, (*key_mask.shape[:-1], k.shape[-2]))


def _check_rank(name: str, x: Array) -> None:
    if x.ndim < 2:
        msg = f"{name} has shape {tuple(x.shape)}, expected (..., n, d) with at least two axes"
        raise ValueError(msg)
