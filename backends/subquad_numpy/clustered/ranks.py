"""Ranks of a few numbers, for a vector of them at once."""

from __future__ import annotations

from typing import Any

from subquad_numpy.codegen import inline, load, spread, where_negative, zeros


@inline
def ranks(values: Any, first: int, last: int, at: int, falls: bool, here: Any, lanes: int) -> Any:
    """How many of values[first] … values[last − 1] come before each of those in the vector from values[at] on.

    Larger ones come first if the order `falls`, else smaller ones; of equal ones, the first. `here` counts the lanes.
    A NaN counts as equal to everything: beside it, ranks are not distinct.
    """
    one, none, own = zeros(values) + 1.0, zeros(values), load(values, at)
    rank = none
    for i in range(first, at):
        gap = spread(values, i) - own if falls else own - spread(values, i)
        rank = rank + where_negative(gap, none, one)
    for i in range(at, min(at + lanes, last)):
        gap = spread(values, i) - own if falls else own - spread(values, i)
        earlier, later = where_negative(gap, none, one), where_negative(gap * -1.0, one, none)
        rank = rank + where_negative((float(i - at) + 0.5) - load(here, 0), earlier, later)
    for i in range(at + lanes, last):
        gap = own - spread(values, i) if falls else spread(values, i) - own
        rank = rank + where_negative(gap, one, none)
    return rank
