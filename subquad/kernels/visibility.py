"""Which keys the rows of queries see, said once.

Queries and keys are aligned at their ends: of n queries and n_kv keys, query i has the place of key i + n_kv − n.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from subquad.backend import Array


class Spans(NamedTuple):
    """Ranges (start, stop) of keys: `whole` is seen by all rows of a block, each of `parts` by some."""

    whole: tuple[int, int]
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Visibility:
    """Causal: query i sees keys up to its own place, i + n_kv − n."""

    causal: bool = True

    def __str__(self) -> str:
        return "causal"

    def spans(self, first: int, count: int, n: int, n_kv: int) -> Spans:
        """The keys that rows `first` … `first + count − 1` of n see."""
        by_all = min(max(first + n_kv - n + 1, 0), n_kv)
        by_some = min(max(first + count + n_kv - n, 0), n_kv)
        return Spans((0, by_all), ((by_all, by_some),) if by_some > by_all else ())

    def pairs(self, xp: ModuleType, rows: tuple[int, int], keys: tuple[int, int], ahead: int, where: Any) -> Array:
        """Whether each of a range of rows sees each of a range of keys, shape (rows, keys); `ahead` is n_kv − n."""
        count, count_kv = rows[1] - rows[0], keys[1] - keys[0]
        limit = xp.arange(count, device=where)[:, None] + (rows[0] + ahead + 1 - keys[0])
        return xp.arange(count_kv, device=where) < limit


CAUSAL = Visibility()


def alignment(n: int, n_kv: int) -> tuple[int, int]:
    """(keys before the place of the first query, queries before the place of the first key)."""
    return max(n_kv - n, 0), max(n - n_kv, 0)
