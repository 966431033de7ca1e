"""Grouped queries: fewer key heads than query heads, axis −3 of rows (..., heads, n, d).

Folded, the queries of one key head lie on an axis of their own: (..., h_kv · g, n, d) → (..., h_kv, g, n, d). What has
one head per key, or one for all, has 1 there and broadcasts.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from subquad.backend import Array


@dataclass(frozen=True)
class Heads:
    """How one call folds its arrays; without groups they stay as they are."""

    xp: ModuleType
    keys: int = 1  # key heads, where queries are grouped
    groups: int = 1  # query heads per key head; 1 where they are not

    def fold(self, x: Array, tail: int = 2) -> Array:
        """(..., heads, tail) → (..., heads, 1, tail), or (..., h_kv, g, tail) of an array that has all query heads."""
        if self.groups == 1 or x.ndim <= tail:
            return x
        heads = x.shape[-tail - 1]
        split = (self.keys, self.groups) if heads == self.keys * self.groups else (heads, 1)
        return self.xp.reshape(x, (*x.shape[: -tail - 1], *split, *x.shape[-tail:]))

    def fold_mask(self, mask: Array | None) -> Array | None:
        return None if mask is None else self.fold(mask, tail=1)

    def unfold(self, x: Array) -> Array:
        """(..., h_kv, g or 1, n, d) → (..., all heads or h_kv, n, d)."""
        if self.groups == 1 or x.ndim < 4:
            return x
        return self.xp.reshape(x, (*x.shape[:-4], x.shape[-4] * x.shape[-3], *x.shape[-2:]))


def head_counts(*arrays: Array | None, tail: int = 2) -> set[int]:
    """Numbers of heads, other than one, of arrays (..., heads, tail)."""
    return {x.shape[-tail - 1] for x in arrays if x is not None and x.ndim > tail} - {1}


def find_heads(xp: ModuleType, keys: set[int], queries: set[int], *, few: str = "k, v", many: str = "q") -> Heads:
    """The fold of arrays with these numbers of heads; none where plain broadcasting does."""
    h_kv, h = max(keys, default=1), max(queries, default=1)
    if h_kv in (0, 1, h) or h == 1:
        return Heads(xp)
    if h % h_kv:
        msg = f"{many} has {h} heads (axis −3) and {few} have {h_kv}; the number for {few} must divide that of {many}"
        raise ValueError(msg)
    return Heads(xp, h_kv, h // h_kv)
