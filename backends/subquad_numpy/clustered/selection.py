"""Which clusters each row opens: those of the largest weights, of all clusters that the row sees.

For all rows of a panel at once, a bound is found: a share of the weight of the row, or, by bisection, what at least as
many weights reach as clusters are to be opened, and few more. The weights that reach it are collected for each row and,
where they are too many, ranked.
"""

from __future__ import annotations

import math
from typing import Any

from subquad_numpy.block_attention.tiles import INFINITY
from subquad_numpy.clustered.ranks import ranks
from subquad_numpy.codegen import at_least, inline, load, lowest_bit, signs, store, where_negative, zeros
from subquad_numpy.codegen.vector_math import LEAST, exp_negative

ROOM = 4  # weights that are collected, at most, for each cluster to be opened
STEP, GROWTH, GROWTHS = 8.0, 4.0, 8  # of steps down from the largest weight to a bound that enough weights reach
HALVES = 9  # of the last step: few weights lie within 1/512 of it


@inline
def room_for(opened: int, lanes: int) -> int:
    """How many weights are collected for a row at most, a multiple of the lanes; of more, which is rare, none is."""
    return -(-(ROOM * opened + 64) // lanes) * lanes


@inline
def find_bound(first: int, most: int, opened: int, panel: int, lanes: int, x: Any, bounds: Any) -> None:
    """A bound for each row that at least `opened` of its weights reach, and few more; (panel,).

    It is what halving an interval leaves, whose upper end, the largest weight at first, too few reach. The lower end is
    sought in steps that grow.
    """
    one = zeros(x) + 1.0
    wanted = zeros(x) + (float(opened) - 0.5)
    for column in range(0, panel, lanes):
        high = zeros(x) - INFINITY
        for t in range(first, most):
            high = at_least(high, load(x, t * panel + column))
        low, step = high - STEP, STEP
        lacks = _reach(first, most, panel, column, x, low, one) - wanted
        for _ in range(GROWTHS):
            if signs(lacks) == 0:
                break
            step *= GROWTH
            high, low = where_negative(lacks, low, high), where_negative(lacks, low - step, low)
            lacks = _reach(first, most, panel, column, x, low, one) - wanted
        high, low = where_negative(lacks, low, high), where_negative(lacks, LEAST(zeros(x)), low)
        for _ in range(HALVES):
            middle = (low + high) * 0.5
            lacks = _reach(first, most, panel, column, x, middle, one) - wanted
            high, low = where_negative(lacks, middle, high), where_negative(lacks, low, middle)
        store(bounds, column, low)


@inline
def find_bound_of_share(
    share: Any, first: int, begin: int, most: int, panel: int, lanes: int, x: Any, others: Any, count: int,
    totals: Any, bounds: Any,
) -> None:  # fmt: skip
    """A share of the weight of each row, of its clusters and of other keys; (panel,), as are the `totals`, for scratch.

    The clusters are those before the number `first` and from `begin` on. All weights, the share and what the first
    `count` rows have in `others` are logarithms.
    """
    for c in range(panel):
        bounds[c] = others[c] if c < count else -INFINITY
    for column in range(0, panel, lanes):
        other = at_least(load(bounds, column), LEAST(zeros(x)))
        best = other
        for t in range(first):
            best = at_least(best, load(x, t * panel + column))
        for t in range(begin, most):
            best = at_least(best, load(x, t * panel + column))
        total = exp_negative(other - best)
        for t in range(first):
            total = total + exp_negative(load(x, t * panel + column) - best)
        for t in range(begin, most):
            total = total + exp_negative(load(x, t * panel + column) - best)
        store(bounds, column, best)
        store(totals, column, total)
    for c in range(panel):
        bounds[c] += math.log(totals[c]) + share


@inline
def _reach(first: int, most: int, panel: int, column: int, x: Any, bound: Any, one: Any) -> Any:
    """How many weights reach the bound of their row; in sums that do not wait for each other."""
    some, others = zeros(x), zeros(x)
    for t in range(first, most - 1, 2):
        some = where_negative(load(x, t * panel + column) - bound, some, some + one)
        others = where_negative(load(x, (t + 1) * panel + column) - bound, others, others + one)
    if (most - first) % 2 != 0:
        some = where_negative(load(x, (most - 1) * panel + column) - bound, some, some + one)
    return some + others


@inline
def collect(
    first: int, most: int, opened: int, panel: int, lanes: int, x: Any, bounds: Any, counts: Any, values: Any,
    names: Any,
) -> None:  # fmt: skip
    """The weights that reach the bound of their row, and the numbers of their clusters: (panel, room); how many."""
    room = room_for(opened, lanes)
    for c in range(panel):
        counts[c] = 0
    for column in range(0, panel, lanes):
        bound = at_least(load(bounds, column), LEAST(zeros(x)))
        for t in range(first, most):
            below = signs(load(x, t * panel + column) - bound)
            above = ~below & ((1 << lanes) - 1)
            while above != 0:
                c = column + lowest_bit(above)
                above = above & (above - 1)
                if counts[c] < room:
                    values[c * room + counts[c]] = x[t * panel + c]
                    names[c * room + counts[c]] = t
                counts[c] += 1


@inline
def choose(
    c: int, count: int, opened: int, lanes: int, here: Any, values: Any, names: Any, chosen: Any, begin: int
) -> int:
    """The clusters of the `opened` largest of `count` collected weights of row c, into `chosen`; how many they are.

    Of equal weights the first ones count. NaN has no rank: a row that has some may open any clusters, but never more.
    `here` counts the lanes.
    """
    first, many = c * room_for(opened, lanes), 0
    for j in range(0, count, lanes):
        rank = zeros(values)
        if count > opened:
            rank = ranks(values, first, first + count, first + j, True, here, lanes)
        kept = signs(rank - (float(opened) - 0.5)) & ((1 << min(lanes, count - j)) - 1)
        while kept != 0 and many < opened:
            chosen[begin + many] = names[first + j + lowest_bit(kept)]
            kept = kept & (kept - 1)
            many += 1
    return many


@inline
def search(
    c: int, first: int, most: int, opened: int, panel: int, x: Any, bounds: Any, values: Any, chosen: Any, begin: int
) -> int:
    """What `choose` finds, from all weights of row c of a panel that reach its bound, one by one."""
    found = 0
    for t in range(first, most):
        own = x[t * panel + c]
        if not own > -INFINITY or own < bounds[c] or (found == opened and not own > values[opened - 1]):
            continue
        at = min(found, opened - 1)
        while at > 0 and values[at - 1] < own:
            values[at], chosen[begin + at] = values[at - 1], chosen[begin + at - 1]
            at -= 1
        values[at], chosen[begin + at] = own, t
        found = min(found + 1, opened)
    return found
