"""φ = value · exp(log) of vectors y, as `subquad.kernels._feature_map` has it.

exponentials:  log = y,           value = 1
elu(y) + 1:    log = min(y, 0),   value = 1 + max(y, 0)
"""

from typing import Any

from subquad_numpy._math import ZERO
from subquad_numpy._simd import at_least, at_most, inline, load


@inline
def _itself(y: Any) -> Any:
    return y


@inline
def _with_its_start(y: Any, start: Any, i: int) -> Any:
    return y  # the product that gave y began with it


@inline
def _alone(e: Any, y: Any) -> Any:
    return e


@inline
def _low(y: Any) -> Any:
    return at_most(y, ZERO(y))


@inline
def _low_after(y: Any, start: Any, i: int) -> Any:
    return at_most(y, ZERO(y)) + load(start, i)


@inline
def _times_high(e: Any, y: Any) -> Any:
    return e * (at_least(y, ZERO(y)) + 1.0)


def map_of(elu: bool) -> tuple[Any, Any, Any]:
    """The functions y → log, (y, start, i) → log + start[i …] and (e, y) → e · value, to be compiled into a kernel."""
    return (_low, _low_after, _times_high) if elu else (_itself, _with_its_start, _alone)
