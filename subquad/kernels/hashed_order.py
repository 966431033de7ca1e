"""The order of rows by the buckets of a locality-sensitive hash (Andoni et al., 2015), in rounds.

    h(x) = argmax [x R; −x R]    for each round's R, or h₁(x) · second + h₂(x) for the two parts of its columns

In a round, rows are sorted by (bucket, place), hidden rows in one bucket after all others, and cut into chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of
from subquad.core.block_loop import fold_blocks, join_rows, rows_per_block
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch


def outputs(
    x: Array, rotations: Array, /, *, first: int, second: int, size: int, key_mask: Array | None = None
) -> tuple[Like, ...]:
    """Shape and dtype of the outputs of `hashed_order`."""
    batch = broadcast_batch(x=x.shape[:-2], key_mask=None if key_mask is None else key_mask.shape[:-1])
    (rounds, _, _), n, whole = rotations.shape, x.shape[-2], namespace_of(x).int32  # rotations have no batch axes
    return Like((*batch, rounds, n), whole), Like((*batch, n, max(rounds - 1, 1)), whole)


@kernel(outputs=outputs, options={"key_mask": None}, reads_half=True)
def hashed_order(
    x: Array, rotations: Array, /, *, first: int, second: int, size: int, key_mask: Array | None = None
) -> tuple[Array, Array]:
    """(order (..., rounds, n), chunk (..., n, rounds − 1)) of rows x (..., n, d), int32, without a gradient.

    The rotations (rounds, d, columns) make `first` buckets of the first half as many columns, times `second` of the
    rest, or none if that is 0. Row order[r, i] is at place i of round r, and chunk[j, r] is the chunk of `size` places
    that row j is in. The last round has no chunks, but a single round has. Rows may have half precision beside
    rotations of float32.
    """
    xp = namespace_of(x)
    *batch, rounds, _ = outputs(x, rotations, first=first, second=second, size=size, key_mask=key_mask)[0].shape
    factors = (first, second) if second else (first,)
    chunks: list[Array] = []

    def orders() -> Iterator[tuple[Array]]:
        for r in range(rounds):
            found = buckets(xp, x, rotations[r, ...], factors)
            if key_mask is not None:
                found = xp.where(key_mask, found, math.prod(factors))
            order = xp.argsort(found, axis=-1, stable=True)
            if r == 0 or r < rounds - 1:
                chunks.append(xp.astype(xp.argsort(order, axis=-1) // size, xp.int32))
            yield (xp.astype(order, xp.int32)[..., None, :],)

    (order,) = join_rows(xp, rounds, orders())
    chunk = xp.stack(chunks, axis=-1)
    if tuple(order.shape[:-2]) != tuple(batch):
        order, chunk = (xp.broadcast_to(y, (*batch, *y.shape[-2:])) for y in (order, chunk))
    return order, chunk


def buckets(xp: ModuleType, x: Array, rotation: Array, factors: tuple[int, ...]) -> Array:
    """The bucket of each row, int32 (..., n), for rotations (d, columns)."""
    size = rows_per_block(math.prod(x.shape[:-2]) * sum(factors) * backend_of(xp).items_behind(x))

    def hashed(_: None, rows: Array) -> tuple[None, Array]:
        turned, found, first = rows @ rotation, None, 0
        for factor in factors:
            part = turned[..., first : first + factor // 2]
            largest = xp.argmax(xp.abs(part), axis=-1, keepdims=True)  # the place of max(|x R|) and its sign
            below = xp.take_along_axis(part, largest, axis=-1)[..., 0] < 0
            own = largest[..., 0] + (factor // 2) * xp.astype(below, largest.dtype)
            found = own if found is None else found * factor + own
            first += factor // 2
        return None, xp.astype(found, xp.int32)[..., None]

    _, found = fold_blocks(hashed, None, [x], size, xp=xp)
    assert found is not None
    return found[..., 0]
