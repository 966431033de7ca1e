"""Which clusters each row opens: those of the largest weights, of all clusters that the row sees.

For all rows of a panel at once, a bound is found that at least as many weights reach as clusters are to be opened: one
of the largest weights of groups of clusters. The few weights that reach it are collected for each row and ranked.
"""

from __future__ import annotations

from typing import Any

from subquad_numpy.block_attention.tiles import INFINITY
from subquad_numpy.clustered.ranks import ranks
from subquad_numpy.codegen import at_least, at_most, inline, load, lowest_bit, signs, store, zeros
from subquad_numpy.codegen.vector_math import LEAST

GROUPS = 4  # groups of clusters for each cluster to be opened


@inline
def room_for(opened: int, lanes: int) -> int:
    """How many weights are collected for a row at most, a multiple of the lanes; of more, which is rare, none is."""
    return -(-(GROUPS * opened + 64) // lanes) * lanes


@inline
def find_bound(first: int, most: int, opened: int, panel: int, lanes: int, x: Any, largest: Any) -> None:
    """The `opened` largest weights of groups of clusters, for each row: (opened, panel), falling."""
    group = max(1, (most - first) // (GROUPS * opened))
    for i in range(0, opened * panel, lanes):
        store(largest, i, zeros(x) - INFINITY)
    for begin in range(first, most, 4 * group):  # four peaks pass the list at once
        for column in range(0, panel, lanes):
            one = _peak(begin, group, most, panel, column, x)
            two = _peak(begin + group, group, most, panel, column, x)
            three = _peak(begin + 2 * group, group, most, panel, column, x)
            four = _peak(begin + 3 * group, group, most, panel, column, x)
            for r in range(opened):
                own = load(largest, r * panel + column)
                own, one = at_least(own, one), at_most(one, own)
                own, two = at_least(own, two), at_most(two, own)
                own, three = at_least(own, three), at_most(three, own)
                own, four = at_least(own, four), at_most(four, own)
                store(largest, r * panel + column, own)


@inline
def _peak(begin: int, group: int, most: int, panel: int, column: int, x: Any) -> Any:
    """The largest weights of one group of clusters."""
    peak = zeros(x) - INFINITY
    for t in range(begin, min(begin + group, most)):
        peak = at_least(peak, load(x, t * panel + column))
    return peak


@inline
def collect(
    first: int, most: int, opened: int, panel: int, lanes: int, x: Any, largest: Any, counts: Any, values: Any,
    names: Any,
) -> None:  # fmt: skip
    """The weights that reach the bound of their row, and the numbers of their clusters: (panel, room); how many."""
    room = room_for(opened, lanes)
    for c in range(panel):
        counts[c] = 0
    for column in range(0, panel, lanes):
        bound = at_least(load(largest, (opened - 1) * panel + column), LEAST(zeros(x)))
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
def search(c: int, first: int, most: int, opened: int, panel: int, x: Any, values: Any, chosen: Any, begin: int) -> int:
    """What `choose` finds, from all weights of row c of a panel, one by one."""
    found = 0
    for t in range(first, most):
        own = x[t * panel + c]
        if not own > -INFINITY or (found == opened and not own > values[opened - 1]):
            continue
        at = min(found, opened - 1)
        while at > 0 and values[at - 1] < own:
            values[at], chosen[begin + at] = values[at - 1], chosen[begin + at - 1]
            at -= 1
        values[at], chosen[begin + at] = own, t
        found = min(found + 1, opened)
    return found
