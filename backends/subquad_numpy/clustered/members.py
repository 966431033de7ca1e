"""Rows that read the keys of a cluster which they opened: an online softmax, with one key in each lane."""

from __future__ import annotations

import math
from typing import Any

from subquad_numpy.block_attention.tiles import INFINITY
from subquad_numpy.codegen import at_least, inline, largest, load, spread, store, total, where_negative, zeros
from subquad_numpy.codegen.vector_math import LEAST, exp_negative

TOGETHER = 4  # rows that share each load of a key and a value


@inline
def hide_members(logit: Any, s: int, many: int, here: Any) -> Any:
    """The logits of one vector of keys, −∞ from key number `many` on; `here` counts the keys."""
    return where_negative(load(here, s) - (float(many) - 0.5), logit, zeros(here) - INFINITY)


@inline
def weigh_members(
    e: Any, size: int, many: int, r: int, width: int, lanes: int, apart: Any, place: float, reach: float, here: Any,
    top: Any, seen: Any, mine: Any,
) -> None:  # fmt: skip
    """Turn the logits `e` of a row into weights, and rescale its sums to the new largest logit.

    Keys whose place, in `apart`, is at most `reach` from that of the row are hidden; a negative `reach` hides none.
    """
    best = LEAST(zeros(e))
    for s in range(0, size, lanes):
        logit = hide_members(load(e, s), s, many, here)
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
        seen[r] = seen[r] * fade
        for p in range(0, width, lanes):
            store(mine, p, load(mine, p) * fade)
        top[r] = new
    along = zeros(e)
    for s in range(0, size, lanes):
        weight = exp_negative(load(e, s) - new)
        store(e, s, weight)
        along = along + weight
    seen[r] = seen[r] + total(along)


@inline
def multiply_one(query: Any, keys: Any, d: int, size: int, lanes: int, scale: Any, e: Any) -> None:
    """The logits of one row, added up in the order of `multiply_four`: a row does not depend on what others open."""
    for s in range(0, size, lanes):
        logit = zeros(e)
        for p in range(d):
            logit = logit + spread(query, p) * load(keys, p * size + s)
        store(e, s, logit * scale)


@inline
def multiply_four(
    q_0: Any, q_1: Any, q_2: Any, q_3: Any, keys: Any, d: int, size: int, lanes: int, scale: Any, e: Any, step: int
) -> None:
    """The logits of four rows, `step` numbers apart in `e`."""
    for s in range(0, size, lanes):
        zero, one, two, three = zeros(e), zeros(e), zeros(e), zeros(e)
        for p in range(d):
            key = load(keys, p * size + s)
            zero = zero + spread(q_0, p) * key
            one = one + spread(q_1, p) * key
            two = two + spread(q_2, p) * key
            three = three + spread(q_3, p) * key
        store(e, s, zero * scale)
        store(e, step + s, one * scale)
        store(e, 2 * step + s, two * scale)
        store(e, 3 * step + s, three * scale)


@inline
def add_values(e: Any, many: int, values: Any, d_v: int, width: int, lanes: int, mine: Any) -> None:
    """Add the weighted values to the sums of one row; a weight of a hidden key is 0, and so is its value."""
    for p in range(0, width, lanes):
        value = load(mine, p)
        for s in range(many):
            value = value + spread(e, s) * load(values, s * d_v + p)
        store(mine, p, value)


@inline
def add_values_of_four(
    e: Any, step: int, many: int, values: Any, d_v: int, width: int, lanes: int, m_0: Any, m_1: Any, m_2: Any, m_3: Any
) -> None:
    """Add the weighted values to the sums of four rows."""
    for p in range(0, width, lanes):
        zero, one, two, three = load(m_0, p), load(m_1, p), load(m_2, p), load(m_3, p)
        for s in range(many):
            value = load(values, s * d_v + p)
            zero = zero + spread(e, s) * value
            one = one + spread(e, step + s) * value
            two = two + spread(e, 2 * step + s) * value
            three = three + spread(e, 3 * step + s) * value
        store(m_0, p, zero)
        store(m_1, p, one)
        store(m_2, p, two)
        store(m_3, p, three)


@inline
def has_bad(values: Any, many: int, d_v: int) -> bool:
    """Whether a value is not finite: rows that hide its key must then not multiply it."""
    rest = values[0] * 0
    for i in range(many * d_v):
        rest += values[i] * 0
    return rest != 0
