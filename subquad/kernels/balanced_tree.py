"""Clusters of a fixed number of rows, by splitting a set of rows in halves again and again.

A set of rows is split by its projections on a direction: the lower half goes left, the upper half right. The direction
begins as the row farthest from the mean, turned towards the first principal component by some steps of power iteration,
and is then replaced by the difference of the means of the two halves, which is 2-means with halves of equal size. Sets
end at `size` rows.

Hidden rows go to the end of every split, so that the visible rows fill the first clusters, and one at most is not full.
"""

from __future__ import annotations

import math
from types import ModuleType

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.gather import gather_rows
from subquad.core.kernel import kernel

POWER_STEPS = 4  # steps of power iteration for each split
MEANS_STEPS = 2  # times that the direction is replaced by the difference of the means


def outputs(x: Array, sketch: Array, /, *, size: int, key_mask: Array | None = None) -> tuple[Like, ...]:
    """Shape and dtype of the output of `balanced_tree`."""
    return (Like((*x.shape[:-2], -(-x.shape[-2] // size) * size), namespace_of(x).int32),)


@kernel(outputs=outputs, options={"key_mask": None})
def balanced_tree(x: Array, sketch: Array, /, *, size: int, key_mask: Array | None = None) -> Array:
    """The rows of x (..., n, d) in clusters of `size`: int32 (..., ⌈n / size⌉ · size), the numbers of rows in order.

    Cluster c has the rows at the places c · size … (c + 1) · size − 1 of the result, in their order. `key_mask` (...,
    n), of the batch of x, hides rows: they come after all visible ones. Places behind the last row have the number n −
    1. The row farthest from the mean is that of the largest |(x − mean) sketch|, for random directions `sketch` (d,
    columns). Equal projections keep the order of rows.
    """
    xp, n = namespace_of(x), x.shape[-2]
    where, outer = place_of(x), x.shape[:-2]
    count = -(-n // size)
    if n == 0 or 0 in outer:
        return xp.zeros((*outer, count * size), dtype=xp.int32, device=where)
    slots = size * 2 ** max(0, math.ceil(math.log2(count)))
    batch = (math.prod(outer),)  # one axis for all sets of rows: some libraries slice few axes
    x = xp.reshape(x, (*batch, *x.shape[-2:]))
    seen = xp.ones((*batch, n), dtype=xp.bool, device=where) if key_mask is None else xp.reshape(key_mask, (*batch, n))
    x = xp.where(seen[..., None], x, 0.0)
    if slots > n:
        x = xp.concat([x, xp.zeros((*batch, slots - n, x.shape[-1]), dtype=x.dtype, device=where)], axis=-2)
        seen = xp.concat([seen, xp.zeros((*batch, slots - n), dtype=xp.bool, device=where)], axis=-1)
    order = xp.astype(xp.argsort(xp.astype(~seen, xp.int32), axis=-1, stable=True), xp.int32)
    width = slots
    rows = xp.concat([x, xp.astype(seen, x.dtype)[..., None]], axis=-1)
    while width > size:
        sets = xp.reshape(gather_rows(xp, rows, order), (batch[0] * slots // width, width, rows.shape[-1]))
        found = _split(xp, sets[..., :-1], sets[..., -1:], sketch)
        order = xp.reshape(order, (batch[0] * slots // width, width))
        order = xp.reshape(xp.take_along_axis(order, found, axis=-1), (*batch, slots))
        width //= 2
    order = order[..., : count * size]
    hidden = gather_rows(xp, xp.astype(~seen, xp.int32)[..., None], order)[..., 0]  # which come last in a cluster, too
    order = xp.reshape(order + hidden * slots, (*outer, count, size))
    order = xp.take_along_axis(order, xp.argsort(order, axis=-1), axis=-1)
    order = xp.reshape(xp.where(order < slots, order, order - slots), (*outer, count * size))
    return xp.where(order < n, order, n - 1)


def _split(xp: ModuleType, x: Array, seen: Array, sketch: Array) -> Array:
    """The order (..., rows) that puts the lower half of each set first; x is (..., rows, d), `seen` (..., rows, 1)."""
    half = x.shape[-2] // 2
    x = (x - _mean(xp, x, seen)) * seen
    size = xp.max(xp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / xp.where(size > 0, size, 1.0)  # a step of power iteration takes sixth powers, which must not overflow
    far = xp.argmax(xp.sum((x @ sketch) ** 2, axis=-1, keepdims=True), axis=-2, keepdims=True)
    direction = xp.matrix_transpose(xp.take_along_axis(x, far, axis=-2))
    for _ in range(POWER_STEPS):
        direction = xp.matrix_transpose(x) @ (x @ direction)
        norm = xp.sqrt(xp.sum(direction * direction, axis=-2, keepdims=True))
        direction = direction / xp.where(norm > 0, norm, 1.0)
    for step in range(MEANS_STEPS + 1):
        along = x @ direction
        projection = xp.where((seen > 0) & (along == along), along, math.inf)[..., 0]  # NaN goes before hidden rows
        order = xp.argsort(projection, axis=-1, stable=True)
        if step < MEANS_STEPS:
            rank = xp.argsort(order, axis=-1)[..., None]
            low = seen * xp.astype(rank < half, x.dtype)
            high = seen - low
            new = xp.matrix_transpose(_mean(xp, x, high) - _mean(xp, x, low))
            direction = xp.where(xp.sum(high, axis=-2, keepdims=True) > 0, new, direction)
    return order


def _mean(xp: ModuleType, x: Array, weight: Array) -> Array:
    """The mean (..., 1, d) of the rows with weight 1; 0 if there are none."""
    count = xp.sum(weight, axis=-2, keepdims=True)
    return xp.matrix_transpose(weight) @ x / xp.where(count > 0, count, 1.0)
