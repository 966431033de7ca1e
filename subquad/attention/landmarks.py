"""Landmarks: m rows that represent all rows of a sequence, whatever its length and mask.

Segments and strata are cut by the *rank* of a row among the c visible rows, so that padding changes nothing.

    segments   the first c mod m have ⌈c/m⌉ rows, the others ⌊c/m⌋
    strata     stratum i has the ranks ⌊i c/m⌋ … ⌊(i+1) c/m⌋ − 1
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.dtypes import cast, compute_dtype
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.segment_means import means_of_segments
from subquad.random import generator

OFFSET_BITS = 12  # random offsets within a stratum are integers of 12 bits: exact on every library, no int32 overflow


def segment_means(xp: ModuleType, x: Array, mask: Array | None, m: int) -> tuple[Array, Array | None]:
    """(means of m consecutive segments (..., m, d), which segments hold a row (..., m) or None: all do).

    Means of half precision are of float32.
    """
    if mask is None:
        return means_of_segments(xp, x, m), None
    rank, count = _ranks(xp, mask)
    length, longer = count // m, count % m
    first = longer * (length + 1)
    one = xp.ones_like(length)
    segment = xp.where(
        rank < first, rank // (length + 1), longer + (rank - first) // xp.where(length == 0, one, length)
    )
    segment = xp.where(mask, segment, -1)
    names, dtype = xp.arange(m, dtype=segment.dtype, device=place_of(x)), compute_dtype(xp, x)
    rows_of_segment = xp.where(names < longer, length + 1, length)
    weight = 1 / xp.astype(xp.where(rows_of_segment == 0, 1, rows_of_segment), dtype)[..., None, :]

    def add(total: Array, rows: Array, keep: Array, segment: Array) -> tuple[Array, None]:
        members = xp.astype(segment == names, dtype) * weight  # before rows are added: no sum overflows
        return total + xp.matrix_transpose(members) @ xp.where(keep, cast(xp, rows, dtype), 0.0), None

    batch = broadcast_batch(x=x.shape[:-2], mask=mask.shape[:-1])
    total = xp.zeros((*batch, m, x.shape[-1]), dtype=dtype, device=place_of(x))
    size = rows_per_block(math.prod(batch) * m * backend_of(xp).items_behind(x, mask))
    total, _ = fold_blocks(add, total, [x, mask[..., None], segment[..., None]], size, xp=xp)
    return total, rows_of_segment > 0


def uniform_rows(xp: ModuleType, x: Array, mask: Array | None, m: int, seed: int) -> tuple[Array, Array | None]:
    """(one random row from each of m strata (..., m, d), which strata hold a row (..., m) or None: all do)."""
    host = backend_of(xp).on_host(_offsets, m, seed)
    if mask is None:
        edges = _strata(xp.arange(m + 1, device=place_of(x)), x.shape[-2], m)
        share = xp.asarray(host, dtype=edges.dtype, device=place_of(x))
        return xp.take(x, edges[:-1] + _offset(share, edges[1:] - edges[:-1]), axis=-2), None
    _, count = _ranks(xp, mask)
    order = xp.argsort(xp.astype(~mask, xp.int8), axis=-1, stable=True)  # rank → position
    names = xp.arange(m + 1, dtype=count.dtype, device=place_of(x))
    edges = _strata(names, count, m)
    width = edges[..., 1:] - edges[..., :-1]
    offset = _offset(xp.asarray(host, dtype=count.dtype, device=place_of(x)), width)
    rank = edges[..., :-1] + offset
    last = xp.asarray(mask.shape[-1] - 1, dtype=count.dtype, device=place_of(x))
    index = xp.take_along_axis(order, xp.astype(xp.minimum(rank, last), order.dtype), axis=-1)[..., None]
    batch = broadcast_batch(x=x.shape[:-2], mask=mask.shape[:-1])
    x = xp.where(mask[..., None], x, 0.0)  # a stratum without a row reads a hidden one: it must not be NaN
    x = xp.broadcast_to(x, (*batch, *x.shape[-2:]))
    index = xp.broadcast_to(index, (*batch, m, x.shape[-1]))
    return xp.take_along_axis(x, index, axis=-2), width > 0


def strata_hold_a_row(xp: ModuleType, n: Any, m: int, where: Any) -> Array:
    """Which of m strata of n rows hold a row, (m,)."""
    edges = _strata(xp.arange(m + 1, device=where), n, m)
    return edges[1:] > edges[:-1]


def count_visible(xp: ModuleType, mask: Array) -> Array:
    """The number of visible rows of each item, (..., 1), int32."""
    return xp.sum(xp.astype(mask, xp.int32), axis=-1, keepdims=True)


def _ranks(xp: ModuleType, mask: Array) -> tuple[Array, Array]:
    rank = xp.cumulative_sum(xp.astype(mask, xp.int32), axis=-1) - 1
    return rank, xp.astype(count_visible(xp, mask), rank.dtype)


def _strata(names: Any, count: Any, m: int) -> Any:
    """⌊i c / m⌋ of each i in `names`, without the product i · c, which may overflow int32."""
    return names * (count // m) + (names * (count % m)) // m


def _offset(share: Array, width: Array) -> Array:
    """⌊share · width / 2¹²⌋, without the product, which may overflow int32."""
    whole = 1 << OFFSET_BITS
    return share * (width // whole) + share * (width % whole) // whole


def _offsets(m: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return generator(seed).integers(0, 1 << OFFSET_BITS, size=m, dtype=np.int64)
