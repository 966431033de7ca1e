"""Means over rows, and the mask of the queries that enter a mean or a landmark."""

from __future__ import annotations

from types import ModuleType

from subquad.attention.call import AttentionCall
from subquad.backend import Array
from subquad.core.loading import backend_of


def self_attention_mask(call: AttentionCall) -> Array | None:
    """The mask of the queries: `key_mask` in self-attention (n = n_kv), where padding hides both; else None."""
    return call.key_mask if call.q.shape[-2] == call.k.shape[-2] else None


def mean_row(xp: ModuleType, x: Array, mask: Array | None) -> Array:
    """The mean (..., 1, d) of the rows that the mask keeps and that are finite; 0 if there is no such row."""
    keep = None if mask is None else mask[..., None]
    mean = _mean(xp, x, keep)
    # a finite mean proves that all rows are finite, at a small part of the cost of looking at each row
    if backend_of(xp).is_concrete(x, mask) and bool(xp.all(xp.isfinite(mean))):
        return mean
    finite = xp.all(xp.isfinite(x), axis=-1, keepdims=True)
    return _mean(xp, x, finite if keep is None else keep & finite)


def _mean(xp: ModuleType, x: Array, keep: Array | None) -> Array:
    """The mean (..., 1, d) of kept rows, which have their weight before they are added: no sum overflows."""
    if keep is None:
        return xp.expand_dims(backend_of(xp).mean_rows(xp, x), axis=-2)
    count = xp.sum(xp.astype(keep, x.dtype), axis=-2, keepdims=True)
    weights = xp.astype(keep, x.dtype) / xp.where(count == 0, xp.ones_like(count), count)
    return xp.matrix_transpose(weights) @ xp.where(keep, x, 0.0)
