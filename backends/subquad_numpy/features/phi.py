"""The maps from rows to features that compiled kernels know: φ = value · exp(log) of vectors y, as in `feature_map`.

    exponential:   log = y,           value = 1               of y = x W
    elu:           log = min(y, 0),   value = 1 + max(y, 0)   of y = factor x

A kernel is compiled for one map and closes over its number, which the functions here take. (It must not close over a
function: that would have another name in every process, and the kernel on disk would not be found.) To add a map, add
its record and its line in each of the four functions.
"""

from typing import Any, NamedTuple

from subquad_numpy.codegen import at_least, at_most, inline, load
from subquad_numpy.codegen.vector_math import ZERO


class Map(NamedTuple):
    """What is known of a map before there are numbers."""

    number: int
    has_directions: bool  # whether y comes from a matrix W


EXPONENTIAL, ELU = range(2)
MAPS = {"exponential": Map(EXPONENTIAL, has_directions=True), "elu": Map(ELU, has_directions=False)}


@inline
def log_of(y: Any, phi: int) -> Any:
    """log φ."""
    if phi == ELU:
        y = at_most(y, ZERO(y))
    return y


@inline
def log_after(y: Any, start: Any, i: int, phi: int) -> Any:
    """log φ + start[i …]; the product that gave y of a map with directions began with it."""
    if phi == ELU:
        y = at_most(y, ZERO(y)) + load(start, i)
    return y


@inline
def times_value(e: Any, y: Any, phi: int) -> Any:
    """e = exp(log φ) times the value."""
    if phi == ELU:
        e = e * (at_least(y, ZERO(y)) + 1.0)
    return e


@inline
def slope_of(slope: Any, y: Any, phi: int) -> Any:
    """dφ/dy, from φ."""
    if phi == ELU:
        slope = slope / (at_least(y, ZERO(y)) + 1.0)
    return slope
