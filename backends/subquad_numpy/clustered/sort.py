"""Values sorted together with the places that they had: short runs by ranks, in all lanes at once, then merged."""

from __future__ import annotations

from typing import Any

from subquad_numpy.block_attention.tiles import INFINITY
from subquad_numpy.clustered.ranks import ranks
from subquad_numpy.codegen import at_most, inline, load, store, zeros

RUN = 64  # values that are sorted by their ranks before runs are merged


@inline
def sort(values: Any, names: Any, count: int, merged: Any, other: Any, here: Any, lanes: int) -> None:
    """Sort values, and put the places that they had into `names`; equal ones keep their order. NaN becomes infinite."""
    for i in range(count):
        names[i] = i
    for i in range(0, count, lanes):
        store(values, i, at_most(zeros(values) + INFINITY, load(values, i)))
    for begin in range(0, count, RUN):
        sort_run(values, names, begin, min(begin + RUN, count), merged, other, here, lanes)
    width = RUN
    while width < count:
        for begin in range(0, count, 2 * width):
            i, middle, last = begin, min(begin + width, count), min(begin + 2 * width, count)
            j = middle
            for place in range(begin, last):
                if i < middle and (j >= last or not values[i] > values[j]):
                    merged[place], other[place] = values[i], names[i]
                    i += 1
                else:
                    merged[place], other[place] = values[j], names[j]
                    j += 1
        for i in range(count):
            values[i], names[i] = merged[i], other[i]
        width *= 2


@inline
def sort_run(values: Any, names: Any, begin: int, end: int, merged: Any, other: Any, here: Any, lanes: int) -> None:
    """Sort a few values by their ranks, how many come before each, in all lanes at once; `here` counts the lanes."""
    for j in range(begin, end, lanes):
        store(here, lanes, ranks(values, begin, end, j, False, here, lanes))
        for i in range(j, min(j + lanes, end)):
            place = begin + int(here[lanes + i - j])
            merged[place], other[place] = values[i], names[i]
    for i in range(begin, end):
        values[i], names[i] = merged[i], other[i]
