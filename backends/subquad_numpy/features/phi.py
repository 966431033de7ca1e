"""The feature maps that compiled kernels know: φ(y) = value · exp(log), as in `subquad.kernels.feature_map`.

    exponential:   log = y,           value = 1               of y = x W
    elu:           log = min(y, 0),   value = 1 + max(y, 0)   of y = factor x

A kernel is compiled for one map and closes over the map's number, which the functions here take as `phi`. (A kernel
that closes over a function would not be found on disk: a function has another name in every process.) To add a map,
add its entry in `MAPS` and a line in each of the four functions.
"""

from typing import Any, NamedTuple

from subquad_numpy.codegen import at_least, at_most, inline, load
from subquad_numpy.codegen.vector_math import ZERO


class Map(NamedTuple):
    """A feature map as kernels see it."""

    number: int
    has_directions: bool  # whether y comes from a matrix W


EXPONENTIAL, ELU = range(2)
MAPS = {"exponential": Map(EXPONENTIAL, has_directions=True), "elu": Map(ELU, has_directions=False)}


@inline
def log_of(y: Any, phi: int) -> Any:
    """log φ(y) without the value: the exponent alone."""
    if phi == ELU:
        y = at_most(y, ZERO(y))
    return y


@inline
def log_after(y: Any, start: Any, i: int, phi: int) -> Any:
    """log φ(y) + start[i …]. With directions, the product that made y has begun with `start`, so nothing is added."""
    if phi == ELU:
        y = at_most(y, ZERO(y)) + load(start, i)
    return y


@inline
def times_value(e: Any, y: Any, phi: int) -> Any:
    """φ(y), from the exponential e = exp(log)."""
    if phi == ELU:
        e = e * (at_least(y, ZERO(y)) + 1.0)
    return e


@inline
def slope_of(slope: Any, y: Any, phi: int) -> Any:
    """dφ/dy, from `slope` = φ(y): φ divided by the value."""
    if phi == ELU:
        slope = slope / (at_least(y, ZERO(y)) + 1.0)
    return slope
