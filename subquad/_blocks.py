"""One driver for everything that runs over a sequence in blocks of rows.

`scan_blocks` folds a step over blocks: `carry, out = step(carry, *blocks)`. It is how memory stays bounded at any
length. The loop is the one thing that the Array API lacks; a backend that has a loop of its own (`scan_blocks`
in its package) replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from subquad._dispatch import Array, backend_of

Step = Callable[..., tuple[Any, Array | None]]

# Elements of the largest temporary of one block, 2 MB in float32: cache and the cost of starting threads balance here.
BLOCK_ELEMENTS = 2**19


def rows_per_block(width: int, *, least: int = 64, most: int = 1024) -> int:
    """Rows whose temporaries of `width` elements each (batch included) fit the cache: a power of two."""
    rows = most
    while rows > least and rows * width > BLOCK_ELEMENTS:
        rows //= 2
    return rows


def scan_blocks(
    step: Step, carry: Any, arrays: Sequence[Array | None], size: int, *, xp: ModuleType, exact: bool = False
) -> tuple[Any, Array | None]:
    """Fold `step` over blocks of `size` rows (axis −2, last block ragged) of `arrays`; None passes as None.

    Returns the last carry and the outputs joined along axis −2 (None where the step gives none). `size` is advice
    unless `exact`: a backend that unrolls loops takes larger blocks.
    """
    backend = backend_of(xp)
    if backend.scan_blocks is not None:
        return backend.scan_blocks(step, carry, arrays, size, exact=exact)
    return loop_blocks(step, carry, arrays, size, xp=xp, in_place=backend.in_place)


def loop_blocks(
    step: Step, carry: Any, arrays: Sequence[Array | None], size: int, *, xp: ModuleType, in_place: bool = False
) -> tuple[Any, Array | None]:
    """`scan_blocks` as a Python loop."""
    n = rows(arrays)
    if n <= size:
        return step(carry, *arrays)
    outs: list[Array] = []
    joined = None
    for start in range(0, n, size):
        stop = min(start + size, n)
        carry, out = step(carry, *take_rows(arrays, start, stop))
        if out is None:
            continue
        if not in_place:
            outs.append(out)
            continue
        if joined is None:
            joined = xp.empty((*out.shape[:-2], n, out.shape[-1]), dtype=out.dtype, device=out.device)
        joined[..., start:stop, :] = out
    if outs:
        joined = xp.concat(outs, axis=-2)
    return carry, joined


def rows(arrays: Sequence[Array | None]) -> int:
    """The common number of rows."""
    return next(x.shape[-2] for x in arrays if x is not None)


def take_rows(arrays: Sequence[Array | None], start: int, stop: int) -> list[Array | None]:
    """Rows start … stop of each array."""
    return [None if x is None else x[..., start:stop, :] for x in arrays]
