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


def check_mask_axes(name: str, mask: Array, *batches: tuple[int, ...], tail: int = 1) -> None:
    """Raise ValueError if the axes of a mask before the last `tail` could as well be the first batch axes as the last.

    Broadcasting aligns them with the last, the heads, and one mask for each item of a batch is easily written that way.
    """
    own = tuple(mask.shape[:-tail])
    for batch in batches:
        if 0 < len(own) < len(batch) and max(own) > 1:
            leading = all(size in (1, other) for size, other in zip(own, batch, strict=False))
            trailing = all(size == 1 or other in (1, size) for size, other in zip(own[::-1], batch[::-1], strict=False))
            if leading and trailing:
                lacking = len(batch) - len(own)
                spread = [":"] * len(own) + ["None"] * lacking + [":"] * tail
                msg = (
                    f"{name} has shape {tuple(mask.shape)} beside arrays of batch shape {tuple(batch)}: its first axes "
                    f"fit the first and the last batch axes; give it all of them, as {name}[{'None, ' * lacking}...] "
                    f"for the last, or {name}[{', '.join(spread)}] for the first"
                )
                raise ValueError(msg)
