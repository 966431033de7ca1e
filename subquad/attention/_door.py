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
    heads: int  # key heads, where queries are grouped
    groups: int  # query heads per key head; 1 where they are not
    leave: Callable[[Array], Array]

    def fold_mask(self, mask: Array) -> Array:
        """A (..., heads, n) array of the caller's in the grouped layout, (..., h_kv, g, n)."""
        return group_mask(self.xp, mask, self.heads, self.groups) if self.groups > 1 else mask

    def fold_rows(self, x: Array) -> Array:
        """A (..., heads, rows, d) array of the caller's in the grouped layout."""
        if self.groups == 1 or x.ndim < 3:
            return x
        if x.shape[-3] == self.heads * self.groups:
            return split_heads(self.xp, x, self.heads)
        return self.xp.expand_dims(x, axis=-3)


def enter(q: Array, k: Array, v: Array, *, causal: bool, key_mask: Array | None, scale: float | None) -> Inputs:
    _arrays.check_given(q=q, k=k, v=v)
    xp = _arrays.check_arrays(q=q, k=k, v=v, key_mask=key_mask)
    _arrays.check_floating(xp, q=q, k=k, v=v)
    causal = _arrays.check_flag("causal", causal)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, x)
    d = check_widths(q, k)
    scale = check_scale(scale, d)
    check_keys(k, v, key_mask, xp)
    if key_mask is not None and key_mask.shape[-1] != k.shape[-2]:
        key_mask = xp.broadcast_to(key_mask, (*key_mask.shape[:-1], k.shape[-2]))
    groups = query_groups(q, k, v)
    heads = max(k.shape[-3], v.shape[-3]) if groups > 1 else 1
    if groups > 1:
        q = split_heads(xp, q, heads)
        k, v = xp.expand_dims(k, axis=-3), xp.expand_dims(v, axis=-3)
        key_mask = group_mask(xp, key_mask, heads, groups)
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
        return merge_heads(xp, out) if groups > 1 else out

    return Inputs(xp, q, k, v, key_mask, causal, scale, heads, groups, leave)


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


def check_keys(k: Array, v: Array, key_mask: Array | None, xp: ModuleType) -> None:
    if v.shape[-2] != k.shape[-2]:
        msg = (
            f"k has {k.shape[-2]} rows (axis −2 of {tuple(k.shape)}) but v has {v.shape[-2]} "
            f"({tuple(v.shape)}); every key needs one value"
        )
        raise ValueError(msg)
    if key_mask is None:
        return
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


def _check_rank(name: str, x: Array) -> None:
    if x.ndim < 2:
        msg = f"{name} has shape {tuple(x.shape)}, expected (..., n, d) with at least two axes"
        raise ValueError(msg)


def query_groups(q: Array, k: Array, v: Array) -> int:
    """Query heads per key head, 1 where plain broadcasting does."""
    if min(q.ndim, k.ndim, v.ndim) < 3:
        return 1
    heads, heads_k, heads_v = q.shape[-3], k.shape[-3], v.shape[-3]
    heads_kv = max(heads_k, heads_v)
    if heads_kv in (1, heads) or heads == 1 or {heads_k, heads_v} - {1, heads_kv}:
        return 1
    if heads % heads_kv:
        msg = f"q has {heads} heads (axis −3) and k, v have {heads_kv}; the number for k and v must divide that of q"
        raise ValueError(msg)
    return int(heads // heads_kv)


def split_heads(xp: ModuleType, x: Array, heads: int) -> Array:
    """(..., heads · g, n, d) → (..., heads, g, n, d)."""
    return xp.reshape(x, (*x.shape[:-3], heads, x.shape[-3] // heads, *x.shape[-2:]))


def merge_heads(xp: ModuleType, x: Array) -> Array:
    """(..., heads, g, n, d) → (..., heads · g, n, d)."""
    return xp.reshape(x, (*x.shape[:-4], x.shape[-4] * x.shape[-3], *x.shape[-2:]))


def group_mask(xp: ModuleType, mask: Array | None, heads: int, groups: int) -> Array | None:
    """A mask (..., heads · groups or heads or 1, n) in the grouped layout."""
    if mask is None or mask.ndim < 2:
        return mask
    if mask.shape[-2] == heads * groups:
        return xp.reshape(mask, (*mask.shape[:-2], heads, groups, mask.shape[-1]))
    return xp.expand_dims(mask, axis=-2)
