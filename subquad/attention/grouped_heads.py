"""Grouped queries: g query heads share each of h_kv key heads; heads are axis −3 of rows (..., heads, n, d).

    array                 heads       folded
    with query heads      h_kv · g    (..., h_kv, g, n, d)
    with key heads        h_kv        (..., h_kv, 1, n, d)
    one head for all      1           (..., 1, 1, n, d)

Folded arrays broadcast against each other by the rules of the standard.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from subquad.backend import Array


@dataclass(frozen=True)
class Heads:
    """The fold of one call; if `groups` is 1, arrays stay as they are."""

    xp: ModuleType
    keys: int = 1  # number of key heads h_kv, if queries are grouped
    groups: int = 1  # number g of query heads for each key head; 1 if queries are not grouped

    def fold(self, x: Array, tail: int = 2) -> Array:
        """Fold (..., heads, tail) to (..., h_kv, g, tail) for h_kv · g heads, else to (..., heads, 1, tail)."""
        if self.groups == 1 or x.ndim <= tail:
            return x
        heads = x.shape[-tail - 1]
        split = (self.keys, self.groups) if heads == self.keys * self.groups else (heads, 1)
        return self.xp.reshape(x, (*x.shape[: -tail - 1], *split, *x.shape[-tail:]))

    def fold_mask(self, mask: Array | None) -> Array | None:
        return None if mask is None else self.fold(mask, tail=1)

    def unfold(self, x: Array) -> Array:
        """Join the two axes of heads: (..., h_kv, g or 1, n, d) to (..., h_kv · g or h_kv, n, d)."""
        if self.groups == 1 or x.ndim < 4:
            return x
        return self.xp.reshape(x, (*x.shape[:-4], x.shape[-4] * x.shape[-3], *x.shape[-2:]))


def head_counts(*arrays: Array | None, tail: int = 2) -> list[int]:
    """The numbers of heads, other than 1, of arrays (..., heads, tail), where the tail has `tail` axes."""
    counts = (x.shape[-tail - 1] for x in arrays if x is not None and x.ndim > tail)
    return [count for count in counts if count != 1]  # no set: a tracer's sizes have no hash


def find_heads(xp: ModuleType, keys: list[int], queries: list[int], *, few: str = "k, v", many: str = "q") -> Heads:
    """The fold for these numbers of key heads and query heads; no groups if plain broadcasting suffices.

    Raises ValueError if the number of key heads does not divide that of query heads; `few` and `many` name the arrays.
    """
    if not keys or not queries:
        return Heads(xp)
    h_kv, h = max(keys), max(queries)
    if 0 in (h_kv, h) or h_kv == h:
        return Heads(xp)
    if h % h_kv:
        msg = f"{many} has {h} heads (axis −3) and {few} have {h_kv}; the number for {few} must divide that of {many}"
        raise ValueError(msg)
    return Heads(xp, h_kv, h // h_kv)
