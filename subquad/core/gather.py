"""Rows of arrays by their numbers, which may differ from item to item of a batch."""

from __future__ import annotations

import math
from types import ModuleType

from subquad.backend import Array
from subquad.core.beside import place_of


def gather_rows(xp: ModuleType, x: Array, index: Array, *, axes: int = 1) -> Array:
    """The rows of x (..., n, width) at `index`, whose last `axes` axes belong to one item; batch axes broadcast.

    The numbers must be in 0 … n − 1. The result has the shape of `index` broadcast to the batch of x, and the width.
    """
    own = x.shape[:-2]
    items = math.prod(own)
    if items != 1:
        firsts = xp.arange(items, dtype=index.dtype, device=place_of(x)) * x.shape[-2]
        index = index + xp.reshape(firsts, (*own, *[1] * axes))
    elif index.ndim - axes < len(own):
        index = xp.broadcast_to(index, (*own[: len(own) - index.ndim + axes], *index.shape))
    flat = xp.reshape(x, (items * x.shape[-2], x.shape[-1]))
    return xp.reshape(xp.take(flat, xp.reshape(index, (-1,)), axis=0), (*index.shape, x.shape[-1]))


def gather(xp: ModuleType, x: Array, index: Array) -> Array:
    """The entries of x (..., n) at `index` (..., m), item by item."""
    return gather_rows(xp, x[..., None], index)[..., 0]
