"""One driver for everything that runs over a sequence in blocks of rows.

`fold_blocks` folds a step over blocks, `carry, out = step(carry, *blocks)`, so that the memory of temporaries depends
on the block and not on the length. The Array API has no loop that a compiler can keep; a backend whose library has one
replaces the Python loop by `Backend.fold_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from subquad.backend import Array
from subquad.core.beside import namespace_of
from subquad.core.loading import backend_of

Step = Callable[..., tuple[Any, Array | None]]

# Target size of a block's largest temporary, in elements (2 MB of float32): smaller blocks pay for starting threads,
# larger ones leave the cache.
BLOCK_ELEMENTS = 2**19


def rows_per_block(width: int, *, min_rows: int = 64, max_rows: int = 1024) -> int:
    """The number of rows in a block, `max_rows` halved until rows · width ≤ BLOCK_ELEMENTS, and not below `min_rows`.

    `width` is the number of elements that a temporary has for each row, batch included.
    """
    rows = max_rows
    while rows > min_rows and rows * width > BLOCK_ELEMENTS:
        rows //= 2
    return rows


def fold_blocks(
    step: Step, carry: Any, arrays: Sequence[Array | None], size: int, *, xp: ModuleType, exact: bool = False
) -> tuple[Any, Array | None]:
    """Fold `step` over blocks of `size` rows (axis −2, last block ragged) of `arrays`; None passes as None.

    Returns the last carry and the outputs joined along axis −2 (None if the step returns None for its output). Unless
    `exact`, `size` is advice: a backend whose compiler unrolls loops takes larger blocks.
    """
    backend = backend_of(xp)
    if not (exact and backend.loops_any_length) and not backend.holds(row_count(arrays) > size):
        # a loop over a number of blocks that varies cannot be recorded
        return step(carry, *arrays)
    return backend.fold_blocks(step, carry, arrays, size, exact=exact)


def loop_blocks(step: Step, carry: Any, arrays: Sequence[Array | None], size: int) -> tuple[Any, Array | None]:
    """Fold `step` over blocks by a Python loop: the default of `Backend.fold_blocks`.

    Where arrays may be filled, each output is written into one for all of them, which saves the copy of joining.
    """
    n = row_count(arrays)
    if n <= size:
        return step(carry, *arrays)
    outs: list[Array] = []
    joined = None
    for start in range(0, n, size):
        stop = min(start + size, n)
        carry, out = step(carry, *take_rows(arrays, start, stop))
        if out is None:
            continue
        if outs or (joined is None and not backend_of(namespace_of(out)).may_fill(out)):
            outs.append(out)
            continue
        if joined is None:
            joined = backend_of(namespace_of(out)).empty_like(out, (*out.shape[:-2], n, out.shape[-1]))
        joined[..., start:stop, :] = out
    if outs:
        joined = namespace_of(outs[0]).concat(outs, axis=-2)
    return carry, joined


def join_rows(xp: ModuleType, n: int, parts: Iterator[tuple[Array, ...]]) -> tuple[Array, ...]:
    """The arrays (..., n, width) of which each part has the next rows, one array for each place of a part's tuple.

    Where arrays may be filled, the parts are written into one as they come: no second copy of them all exists.
    """
    part: tuple[Array, ...] | None = next(parts)
    assert part is not None
    if part[0].shape[-2] == n:
        return part
    backend = backend_of(xp)
    if not backend.may_fill(*part):
        return tuple(xp.concat(list(arrays), axis=-2) for arrays in zip(part, *parts, strict=True))
    joined = tuple(backend.empty_like(x, (*x.shape[:-2], n, x.shape[-1])) for x in part)
    start = 0
    while part is not None:
        start = _put_rows(joined, start, part)
        part = None  # its memory serves the next one
        part = next(parts, None)
    return joined


def _put_rows(joined: tuple[Array, ...], start: int, part: tuple[Array, ...]) -> int:
    """Write the rows of a part from `start` on, and return where they end."""
    stop = start + part[0].shape[-2]
    for whole, rows in zip(joined, part, strict=True):
        whole[..., start:stop, :] = rows
    return stop


def row_count(arrays: Sequence[Array | None]) -> int:
    """The number of rows (axis −2) of the first array that is not None; all have the same number."""
    for x in arrays:
        if x is not None:
            return x.shape[-2]
    msg = "there is no array to count the rows of"
    raise ValueError(msg)


def take_rows(arrays: Sequence[Array | None], start: int, stop: int) -> list[Array | None]:
    """Rows start … stop − 1 (axis −2) of each array; None stays None."""
    return [None if x is None else x[..., start:stop, :] for x in arrays]
