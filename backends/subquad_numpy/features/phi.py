"""φ = value · exp(log) of vectors y, as `subquad.kernels._feature_map` has it.

    exponentials:  log = y,           value = 1
    elu(y) + 1:    log = min(y, 0),   value = 1 + max(y, 0)

`elu` is a constant of the kernel that calls. (A function that a kernel closes over would have another name in every
process, and the kernel on disk would not be found.)
"""

from typing import Any

from subquad_numpy.codegen import at_least, at_most, inline, load
from subquad_numpy.codegen.vector_math import ZERO


@inline
def log_of(y: Any, elu: bool) -> Any:
    """log φ."""
    if elu:
        y = at_most(y, ZERO(y))
    return y


@inline
def log_after(y: Any, start: Any, i: int, elu: bool) -> Any:
    """log φ + start[i …]; the product that gave y of an exponential began with it."""
    if elu:
        y = at_most(y, ZERO(y)) + load(start, i)
    return y


@inline
def times_value(e: Any, y: Any, elu: bool) -> Any:
    """e = exp(log φ) times the value."""
    if elu:
        e = e * (at_least(y, ZERO(y)) + 1.0)
    return e


@inline
def slope_of(phi: Any, y: Any, elu: bool) -> Any:
    """dφ/dy."""
    if elu:
        phi = phi / (at_least(y, ZERO(y)) + 1.0)
    return phi
