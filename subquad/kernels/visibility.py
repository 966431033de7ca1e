"""Visibility: which keys each row of queries sees; the one place that aligns queries with keys.

Queries and keys are aligned at their ends: of n queries and n_kv keys, query i stands at the place of key i + n_kv − n.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from subquad.backend import Array


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
