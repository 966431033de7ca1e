"""Visibility: which keys each row of queries sees; the one place that aligns queries with keys.

Queries and keys are aligned at their ends: of n queries and n_kv keys, query i stands at the place of key i + n_kv − n.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.loading import backend_of


class Spans(NamedTuple):
    """Ranges (start, stop) of keys: all rows of a block see all of `whole`, and some rows see some keys of `parts`."""

    whole: tuple[int, int]
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Visibility:
    """The causal rule: query i sees the keys up to its own place, 0 … i + n_kv − n."""

    causal: bool = True

    def __str__(self) -> str:
        return "causal"

    def spans(self, first: int, count: int, n: int, n_kv: int) -> Spans:
        """The ranges of keys that rows `first` … `first + count − 1` see, of n rows and n_kv keys.

        The place of the first row is counted among the keys that some rows see: the block on the diagonal is square.
        """
        by_all = min(max(first + n_kv - n, 0), n_kv)
        by_some = min(max(first + count + n_kv - n, 0), n_kv)
        return Spans((0, by_all), ((by_all, by_some),) if by_some > by_all else ())

    def pairs(self, xp: ModuleType, rows: tuple[int, int], keys: tuple[int, int], ahead: int, where: Any) -> Array:
        """Whether each row of a range sees each key of a range: bool, shape (rows, keys); `ahead` is n_kv − n."""
        count, count_kv = rows[1] - rows[0], keys[1] - keys[0]
        limit = xp.arange(count, device=where)[:, None] + (rows[0] + ahead + 1 - keys[0])
        return xp.arange(count_kv, device=where) < limit


CAUSAL = Visibility()


def alignment(n: int, n_kv: int) -> tuple[int, int]:
    """(keys before the place of the first query, queries before the place of the first key)."""
    return max(n_kv - n, 0), max(n - n_kv, 0)


class Sight(NamedTuple):
    """What each row may see, as places of keys: integer arrays (..., n).

    Row i stands at the place `place[i]`, from which causality and windows are counted, and sees no key outside of
    start[i] … stop[i] − 1.
    """

    place: Array
    start: Array
    stop: Array


def plain_sight(
    xp: ModuleType, like: Array, n: int, n_kv: int, *, left: int | None = None, right: int | None = None
) -> Sight:
    """The sight of n rows beside n_kv keys, aligned at the ends, that see `left` keys before and `right` keys after.

    None: no limit. `like` is an array of the call; where its values can be read, the sight is made once and kept.
    """
    where = place_of(like)
    if backend_of(xp).is_concrete(like):
        return Sight(*(xp.asarray(x, device=where) for x in _host_sight(n, n_kv, left, right)))
    return narrowed(xp, _aligned(xp, n, n_kv, device=where), left, right)


def _aligned(xp: Any, n: int, n_kv: int, **where: Any) -> Sight:
    place = xp.arange(n, dtype=xp.int32, **where) + (n_kv - n)
    return Sight(place, xp.zeros_like(place), xp.zeros_like(place) + n_kv)


FARTHEST = 2**30  # places are int32, and no key is farther


def narrowed(xp: Any, sight: Sight, left: int | None = None, right: int | None = None) -> Sight:
    """The sight of rows that see at most `left` keys before and `right` keys after their place; None: no limit."""
    place, start, stop = sight
    if left is not None:
        start = xp.maximum(start, place - min(left, FARTHEST))
    if right is not None:
        stop = xp.minimum(stop, place + (min(right, FARTHEST) + 1))
    return Sight(place, start, stop)


@lru_cache(64)
def _host_sight(n: int, n_kv: int, left: int | None, right: int | None) -> Sight:
    sight = narrowed(np, _aligned(np, n, n_kv), left, right)
    return Sight(*(x.astype(np.int32) for x in sight))


def frontier_sight(xp: ModuleType, visible: Array) -> Sight:
    """The sight of rows that see the first `visible[i]` keys each; they stand at the last of them."""
    return Sight(visible - 1, xp.zeros_like(visible), visible)


def intersection(xp: ModuleType, sight: Sight, other: Sight) -> Sight:
    """The sight of rows at the places of the first one that see what both see."""
    return Sight(sight.place, xp.maximum(sight.start, other.start), xp.minimum(sight.stop, other.stop))


def document_sight(xp: ModuleType, of_queries: Array, of_keys: Array, where: Any) -> Sight:
    """The sight of rows that see the keys with their own number; equal numbers lie together.

    The numbers are int32, (..., n) and (..., n_kv), of one batch shape. The rows and keys of a document are aligned at
    its end, as those of a sequence of its own.
    """
    batch, n, n_kv = of_queries.shape[:-1], of_queries.shape[-1], of_keys.shape[-1]

    def of_item(queries: Array, keys: Array) -> Sight:
        def bounds(own: Array) -> tuple[Array, Array]:
            # a stable sort leaves the members of a document in a row: the first of them, and how many there are
            order = xp.argsort(own, stable=True)
            ordered = xp.take(own, order)
            first, last = (xp.searchsorted(ordered, queries, side=side) for side in ("left", "right"))
            begin = xp.take(order, xp.minimum(first, xp.zeros_like(first) + (own.shape[0] - 1)))
            return xp.astype(begin, xp.int32), xp.astype(last - first, xp.int32)

        begin, count = bounds(keys)
        begin_q, count_q = bounds(queries)
        stop = begin + count
        rows = xp.arange(n, dtype=xp.int32, device=where)
        return Sight(stop - (begin_q + count_q) + rows, begin, stop)

    if n == 0 or n_kv == 0 or 0 in batch:
        nothing = xp.zeros((*batch, n), dtype=xp.int32, device=where)
        return Sight(nothing, nothing, nothing)
    flat_q, flat_k = (xp.reshape(x, (-1, x.shape[-1])) for x in (of_queries, of_keys))
    items = [of_item(flat_q[i, :], flat_k[i, :]) for i in range(flat_q.shape[0])]
    return Sight(*(xp.reshape(xp.stack(parts), (*batch, n)) for parts in zip(*items, strict=True)))
