"""The place of the largest number of a row, which a few vectors hold."""

from typing import Any

from subquad_numpy.codegen import inline, largest, where_negative


@inline
def least_place_of_largest(best: Any, place: Any, beyond: Any) -> Any:
    """The least of the places, one in each lane, at which `best` is largest; `beyond` holds a larger one in each lane.

    Lanes without a number count as largest; a difference of infinities is NaN, which is not negative.
    """
    return -largest(-where_negative(best - largest(best), beyond, place))
