"""Batch shapes: how they broadcast, with arguments named in errors, and how they are flattened."""

from __future__ import annotations

import math
from types import ModuleType

from subquad.backend import Array


def broadcast_batch(**shapes: tuple[int, ...] | None) -> tuple[int, ...]:
    """The common batch shape by the broadcasting rules of the standard; None entries do not count.

    ValueError lists all shapes by the names of their arguments if they do not broadcast.
    """
    first = None
    for shape in shapes.values():
        if shape is None:
            continue
        if first is None:
            first = shape
        elif shape != first:
            break
    else:  # all shapes are equal, the usual case: no axis needs a look
        return () if first is None else tuple(first)
    result: list[int] = []
    for shape in shapes.values():
        if shape is None:
            continue
        for axis in range(1, len(shape) + 1):
            if axis > len(result):
                result.insert(0, shape[-axis])
            elif result[-axis] == 1:
                result[-axis] = shape[-axis]
            elif shape[-axis] not in (1, result[-axis]):
                listed = ", ".join(f"{name} {list(s)}" for name, s in shapes.items() if s is not None)
                msg = f"batch shapes do not broadcast: {listed}; they must be equal or 1 axis by axis"
                raise ValueError(msg)
    return tuple(result)


def flatten_batch(xp: ModuleType, x: Array, batch: tuple[int, ...], rank: int) -> Array:
    """Broadcast `x` to (*batch, *tail) and reshape to (product of `batch`, *tail); tail is its last `rank` axes."""
    tail = tuple(x.shape[-rank:])
    flat = (math.prod(batch), *tail)
    if tuple(x.shape) == flat and len(batch) == 1:
        return x
    if tuple(x.shape[:-rank]) != batch:
        x = xp.broadcast_to(x, (*batch, *tail))
    return xp.reshape(x, flat)
