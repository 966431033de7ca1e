"""The nearest of m centres for each row, and the sums of the rows that are nearest to each: a step of k-means.

    index[i] = argmin_c |x[i] − c|,    count[c] = #{i : index[i] = c},    total[c] = Σ x[i],    summed[c] = Σ values[i]

where the sums run over the rows i with index[i] = c. Which centre is nearest is constant for gradients, which flow
through the sums.
"""

from __future__ import annotations

import math
from types import ModuleType

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch


def outputs(x: Array, centres: Array, values: Array | None, /, *, key_mask: Array | None = None) -> tuple[Like, ...]:
    """Shape and dtype of the outputs of `nearest`."""
    given = {"x": x, "centres": centres, "values": values}
    shapes = {name: array.shape[:-2] for name, array in given.items() if array is not None}
    batch = broadcast_batch(**shapes, key_mask=None if key_mask is None else key_mask.shape[:-1])
    (n, d), m, whole = x.shape[-2:], centres.shape[-2], namespace_of(x).int32
    sums = [Like((*batch, m, d), x.dtype)]
    sums += [] if values is None else [Like((*batch, m, values.shape[-1]), x.dtype)]
    return Like((*batch, n), whole), Like((*batch, m), whole), *sums


@kernel(outputs=outputs, options={"key_mask": None})
def nearest(x: Array, centres: Array, values: Array | None, /, *, key_mask: Array | None = None) -> tuple[Array, ...]:
    """(index (..., n), count (..., m), total (..., m, d), summed (..., m, d_v)), or the first three without `values`.

    For rows x (..., n, d), finite centres (..., m, d) and values (..., n, d_v). Index and count are int32. A row that
    the mask hides, or that is not finite, has the index −1 and is in no sum. Of equally near centres, the first counts.
    """
    xp, m = namespace_of(x), centres.shape[-2]
    index, counts, *sums = outputs(x, centres, values, key_mask=key_mask)
    batch = index.shape[:-1]
    # distances are those of rows and centres relative to a point amidst them, where squares lose no digits
    origin = xp.expand_dims(backend_of(xp).mean_rows(xp, centres), axis=-2)
    directions = xp.matrix_transpose(centres - origin)
    half = xp.sum(directions * directions, axis=-2, keepdims=True) / 2
    names = xp.arange(m, dtype=xp.int32, device=place_of(x))

    def add(found: tuple[Array, ...], rows: Array, keep: Array | None, values: Array | None) -> tuple[object, Array]:
        seen = xp.all(xp.isfinite(rows), axis=-1, keepdims=True)
        seen = seen if keep is None else seen & keep
        rows = xp.where(seen, rows, 0.0)
        own = xp.astype(xp.argmax((rows - origin) @ directions - half, axis=-1, keepdims=True), xp.int32)
        own = _whole(xp, xp.where(seen, own, -1), (*batch, rows.shape[-2], 1))
        members = own == names
        count = found[0] + xp.sum(xp.astype(members, xp.int32), axis=-2, dtype=xp.int32)
        members = xp.matrix_transpose(xp.astype(members, rows.dtype))
        given = (rows,) if values is None else (rows, xp.where(seen, values, 0.0))
        return (count, *(x + members @ y for x, y in zip(found[1:], given, strict=True))), own

    zeros = tuple(xp.zeros(like.shape, dtype=like.dtype, device=place_of(x)) for like in (counts, *sums))
    if x.shape[-2] == 0:
        return (xp.zeros(index.shape, dtype=index.dtype, device=place_of(x)), *zeros)
    size = rows_per_block(max(1, math.prod(batch)) * m * backend_of(xp).items_behind(x, centres, values))
    keep = None if key_mask is None else key_mask[..., None]
    found, own = fold_blocks(add, zeros, [x, keep, values], size, xp=xp)
    assert own is not None
    return own[..., 0], *found


def _whole(xp: ModuleType, x: Array, shape: tuple[int, ...]) -> Array:
    return x if tuple(x.shape) == shape else xp.broadcast_to(x, shape)
