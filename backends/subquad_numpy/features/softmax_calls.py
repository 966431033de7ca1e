"""Softmax attention on NumPy arrays by compiled kernels, where one side is small by those of features: `softmax`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from subquad.kernels.max_shift import finite_shift
from subquad_numpy.block_attention import whole
from subquad_numpy.features.operand import Operand, hide
from subquad_numpy.features.runs import SMALL_KEYS, Array, Arrays, New, Planned, Reading, Sums, mask_batch
from subquad_numpy.plain import attention
from subquad_numpy.runtime.arguments import Forms, straight
from subquad_numpy.runtime.stored import rounded, widened

TILE = 8  # queries that fill a tile


class RowSums(NamedTuple):
    """Sums of softmax attention for each query: its largest logit, and the sum of its weights over exp(that logit)."""

    shift: Array  # (..., n, 1), finite
    total: Array  # (..., n, 1), positive


def _plan_softmax(arrays: Arrays, static: Mapping[str, Any], save: bool) -> Planned:
    """`softmax_attention`; where one side is small, perhaps by features: see `is_by_tiles`."""
    q, k, v, key_mask = arrays
    scale, dtype = static["scale"], q.dtype
    n, n_kv, d_v = q.shape[-2], k.shape[-2], v.shape[-1]
    batch = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], mask_batch(key_mask))
    shape = *batch, n, d_v
    if is_by_tiles(n, n_kv, static, save):
        return whole.plan(arrays, static, save)
    are_wide = widened(k) is k and widened(v) is v
    if is_by_keys(n, n_kv):  # a small number of keys: they are the directions of the queries
        shown_k, shown_v, start = hide(np, widened(k), widened(v), key_mask)
        operand = Operand(shown_k.swapaxes(-1, -2), scale)
        read = Reading(batch, q, operand, start, shown_v, None, is_shift=False)

        def of_all_queries(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], None]:
            q, k, v, key_mask = arrays
            if not are_wide:
                k, v = widened(k), widened(v)
            k, v, start = hide(np, k, v, key_mask)
            out = new(shape, dtype)
            read(q, k.swapaxes(-1, -2), None, start, v, None, out, threads)
            if key_mask is not None and not (seen := key_mask.any(axis=-1)).all():
                out[np.broadcast_to(~seen, batch)] = 0  # even where the query is NaN
            return (out,), None

        def of_rows(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], None]:
            q, k, v, _ = arrays
            out = new(shape, dtype)
            run((q, k, v, out), threads)  # a transpose begins where its matrix does
            return (out,), None

        if key_mask is not None or not are_wide or not read.is_straight:
            return of_all_queries
        run = read.run_of(("x", "W", "kv", "out"))
        return straight(of_rows, short=run.small)
    if not save:

        def of_one_query(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], None]:
            *rows, key_mask = arrays
            out = new(shape, dtype)
            found = attention.softmax_attention(*map(widened, rows), scale=scale, key_mask=key_mask)
            out[...] = rounded(found, dtype)
            return (out,), None

        return of_one_query
    sums = Sums(batch, k, v, Operand(widened(q).swapaxes(-1, -2), scale), key_mask)
    is_wide = dtype == sums.dtype

    def of_all_keys(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], RowSums | None]:
        q, k, v, key_mask = arrays
        out = new(shape, dtype)
        found = out if is_wide else np.empty(shape, sums.dtype)
        shift, _, total = sums(k, v, key_mask, widened(q).swapaxes(-1, -2), None, np.empty, threads, found)
        total[total == 0] = 1  # a row without a visible key is 0
        found /= total
        if not is_wide:
            out[...] = rounded(found, dtype)
        return (out,), RowSums(finite_shift(np, shift), total) if save else None

    return of_all_keys


def is_by_tiles(n: int, n_kv: int, static: Mapping[str, Any], save: bool) -> bool:
    """Whether softmax attention goes by the tiles of block attention, and not by features.

    Queries of a small number of keys go by features, which turn no rows: with 64 keys that takes two thirds of the time
    of tiles. For a gradient, small numbers of rows go by features too. One query would fill one lane of a vector: it
    reads many keys by products of the library.
    """
    if static.get("visible") is not None:
        return True
    return n > SMALL_KEYS < n_kv if save else n > 1 and not (n >= 2 * TILE and is_by_keys(n, n_kv))


def is_by_keys(n: int, n_kv: int) -> bool:
    """Whether keys are the directions of queries, rather than queries those of keys: the keys stay in cache.

    Rows come in tiles, so that one query or a few of them would leave most of a tile empty.
    """
    return n_kv <= SMALL_KEYS and n >= TILE


softmax = Forms(_plan_softmax)
