"""Rows that read the keys of a cluster which they opened: an online softmax, with one key in each lane."""

from __future__ import annotations

import math
from typing import Any

from subquad_numpy.block_attention.tiles import INFINITY
from subquad_numpy.codegen import at_least, inline, largest, load, spread, store, where_negative, zeros
from subquad_numpy.codegen.vector_math import LEAST, exp_negative


@inline
def hide_members(logit: Any, s: int, many: int, here: Any) -> Any:
    """The logits of one vector of keys, −∞ from key number `many` on; `here` counts the keys."""
    return where_negative(load(here, s) - (float(many) - 0.5), logit, zeros(here) - INFINITY)


@inline
def weigh_members(
    e: Any, scale: Any, size: int, many: int, r: int, width: int, lanes: int, apart: Any, place: float, reach: float,
    here: Any, top: Any, before: Any, seen: Any, mine: Any,
) -> None:  # fmt: skip
    """Turn the products `e` of a row into weights, and rescale its sums to the new largest logit.

    The sum of its weights is `before`, plus the lanes of the row's vector in `seen`.

    Keys whose place, in `apart`, is at most `reach` from that of the row are hidden; a negative `reach` hides none.
    """
    best = LEAST(zeros(e))
    for s in range(0, size, lanes):
        logit = load(e, s) * scale
        if s + lanes > many:
            logit = hide_members(logit, s, many, here)
        if reach >= 0:
            distance = load(apart, s) - place
            far = where_negative(distance + (reach + 0.5), logit, zeros(e) - INFINITY)
            logit = where_negative(distance * -1.0 + (reach + 0.5), logit, far)
        store(e, s, logit)
        best = at_least(best, logit)
    old = top[r]
    new = max(old, largest(best))
    if new > old:
        fade = math.exp(old - new)
        before[r] = before[r] * fade
        store(seen, r * lanes, load(seen, r * lanes) * fade)
        for p in range(0, width, lanes):
            store(mine, p, load(mine, p) * fade)
        top[r] = new
    along = load(seen, r * lanes)
    for s in range(0, size, lanes):
        weight = exp_negative(load(e, s) - new)
        store(e, s, weight)
        along = along + weight
    store(seen, r * lanes, along)


@inline
def add_values(e: Any, many: int, values: Any, d_v: int, width: int, lanes: int, mine: Any) -> None:
    """Add the weighted values to the sums of one row; a weight of a hidden key is 0, and so is its value."""
    for p in range(0, width, lanes):
        value = load(mine, p)
        for s in range(many):
            value = value + spread(e, s) * load(values, s * d_v + p)
        store(mine, p, value)


@inline
def has_bad(values: Any, many: int, d_v: int) -> bool:
    """Whether a value is not finite: rows that hide its key must then not multiply it."""
    rest = values[0] * 0
    for i in range(many * d_v):
        rest += values[i] * 0
    return rest != 0
