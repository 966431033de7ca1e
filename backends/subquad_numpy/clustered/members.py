"""Rows that read the keys of a cluster which they opened: an online softmax, with one key in each lane."""

from __future__ import annotations

import math
from typing import Any

from subquad_numpy.block_attention.tiles import INFINITY
from subquad_numpy.codegen import (
    at_least,
    inline,
    largest,
    load,
    prefetch,
    shifted,
    signs,
    spread,
    store,
    where_negative,
    zeros,
)
from subquad_numpy.codegen.matmul import padded
from subquad_numpy.codegen.side_by_side import exp_negative
from subquad_numpy.codegen.vector_math import LEAST


@inline
def hide_members(logit: Any, s: int, many: int, here: Any) -> Any:
    """The logits of one vector of keys, −∞ from key number `many` on; `here` counts the keys."""
    return where_negative(load(here, s) - (float(many) - 0.5), logit, zeros(here) - INFINITY)


@inline
def weigh_members(
    e: Any, wide: int, together: int, rows: Any, scale: Any, size: int, many: int, width: int, lanes: int, apart: Any,
    place: Any, row: int, reach: float, here: Any, top: Any, before: Any, seen: Any, sums: Any,
) -> None:  # fmt: skip
    """Turn the products `e` of the rows of a tile into weights, and rescale sums of rows to their new largest logits.

    The products of a row are `wide` numbers apart from those of the next one; memory for an even number of rows is
    needed. The sum of the weights of a row is `before`, plus the lanes of the row's vector in `seen`.

    Keys whose place, in `apart`, is at most `reach` from that of the row, `row` places on in `place`, are hidden; a
    negative `reach` hides none.
    """
    for t in range(together):
        r, mine, best = rows[t], shifted(e, t * wide), LEAST(zeros(e))
        for s in range(0, size, lanes):
            logit = load(mine, s) * scale
            if s + lanes > many:
                logit = hide_members(logit, s, many, here)
            if reach >= 0:
                distance = load(apart, s) - float(place[row + r])
                far = where_negative(distance + (reach + 0.5), logit, zeros(e) - INFINITY)
                logit = where_negative(distance * -1.0 + (reach + 0.5), logit, far)
            store(mine, s, logit)
            best = at_least(best, logit)
        old = new = top[r]
        if signs(spread(top, r) - best) != 0:  # else no logit is larger, as for most clusters
            new = max(old, largest(best))
        if new > old:
            fade = math.exp(old - new)
            before[r] = before[r] * fade
            store(seen, r * lanes, load(seen, r * lanes) * fade)
            for p in range(r * width, (r + 1) * width, lanes):
                store(sums, p, load(sums, p) * fade)
            top[r] = new
        for s in range(0, size, lanes):
            store(mine, s, load(mine, s) - new)
    for s in range(0, together * wide, 2 * lanes):
        x, y = exp_negative((load(e, s), load(e, s + lanes)))
        store(e, s, x)
        store(e, s + lanes, y)
    for t in range(together):
        r = rows[t]
        along = load(seen, r * lanes)
        for s in range(t * wide, t * wide + size, lanes):
            along = along + load(e, s)
        store(seen, r * lanes, along)


@inline
def ask_for_part(memory: Any, first: int, count: int, part: int, parts: int, lanes: int) -> None:
    """Ask for the cache lines of one of the parts of `count` numbers from memory[first] on."""
    share = padded(-(-count // parts), lanes)
    for i in range(first + part * share, first + min((part + 1) * share, count), lanes):
        prefetch(memory, i)


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
