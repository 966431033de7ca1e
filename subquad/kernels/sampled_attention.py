"""Softmax attention of a few rows, and what tells how it is spread: the ground of estimates of a method's error.

out[i] = Σ_j p[i, j] v[j],    p[i, j] = exp(x[i, j] − lse[i]),    x[i, j] = s q[i]·k[j]
lse[i] = log Σ_j exp(x[i, j])
effective[i] = 1 / Σ_j p[i, j]² = (Σ_j exp(x[i, j]))² / Σ_j exp(2 x[i, j]): the number of keys of equal weight
mean[i] = Σ_j v[j] / (number of keys that row i sees): attention that ignores q and k
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.dtypes import cast, compute_dtype
from subquad.core.gather import gather_rows
from subquad.core.kernel import kernel
from subquad.core.shapes import broadcast_batch
from subquad.kernels.block_attention import batch_of, block_attention
from subquad.kernels.max_shift import divide_or_zero

NO_LIST = (None,) * 7  # of blocks, places, meetings and masks


def outputs(
    q: Array, k: Array, v: Array, start: Array, stop: Array, numbers: Array | None, /, *, scale: float,
    every: int, key_mask: Array | None = None,
) -> tuple[Like, ...]:  # fmt: skip
    """Shape and dtype of the outputs of `sampled_attention`."""
    batch = batch_of({"q": q, "k": k, "v": v}, {"start": start, "stop": stop}, key_mask)
    rows = q.shape[-2] if numbers is None else numbers.shape[-1]
    dtype = compute_dtype(namespace_of(q), q, k, v)
    wide = Like((*batch, rows, v.shape[-1]), dtype)
    return wide, Like((*batch, rows), dtype), Like((*batch, -(-rows // every)), dtype), wide


@kernel(outputs=outputs, options={"key_mask": None}, reads_half=True)
def sampled_attention(
    q: Array, k: Array, v: Array, start: Array, stop: Array, numbers: Array | None, /, *, scale: float,
    every: int, key_mask: Array | None = None,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """(out (..., r, d_v), lse (..., r), effective (..., ⌈r / every⌉), mean (..., r, d_v)) of rows q (..., r, d).

    With `numbers`, int32 (r,), of these rows of q (..., n, d). Row i sees the keys start[i] … stop[i] − 1, arrays
    (..., r), that the mask shows. One that sees none gives 0, −∞, 0 and 0. `effective` is that of the rows 0, every,
    2 every …: here, that of all would cost half as much as the rest.
    q, k and v may have half precision in place of float32, which the outputs have.
    """
    xp, few, first = namespace_of(q), slice(None, None, every), slice(0, min(1, v.shape[-1]))
    q = q if numbers is None else xp.take(q, numbers, axis=-2)
    options: dict[str, Any] = {"size": 1, "key_mask": key_mask}
    out, lse = block_attention(q, k, v, start, stop, *NO_LIST, scale=scale, **options)
    _, twice = block_attention(
        q[..., few, :], k, v[..., first], start[..., few], stop[..., few], *NO_LIST, scale=2 * scale, **options
    )
    some = lse[..., few] != -math.inf
    once, twice = (xp.where(some, x, 0.0) for x in (lse[..., few], twice))  # −∞ − −∞ is NaN
    effective = xp.where(some, xp.exp(2 * once - twice), 0.0)
    found = out, lse, effective, visible_means(xp, v, key_mask, start, stop)
    likes = outputs(q, k, v, start, stop, None, scale=scale, every=every, key_mask=key_mask)
    wide = (xp.broadcast_to(cast(xp, x, like.dtype), like.shape) for x, like in zip(found, likes, strict=True))
    return tuple(wide)


def visible_means(xp: ModuleType, v: Array, key_mask: Array | None, start: Array, stop: Array) -> Array:
    """The means (..., r, d_v) of the values at the places start … stop − 1 that the mask shows; 0 of none.

    NaN for a row that sees a value with a number that is not finite.

    O(n_kv d_v) operations: sums over intervals are differences of cumulative sums, block by block.
    """
    mask = None if key_mask is None else key_mask.shape[:-1]
    batch, d_v = broadcast_batch(v=v.shape[:-2], rows=start.shape[:-1], key_mask=mask), v.shape[-1]
    total = xp.zeros((*batch, start.shape[-1], d_v + 2), dtype=v.dtype, device=place_of(v))
    if v.shape[-2] == 0:
        return total[..., :-2]

    def add(carry: Any, v: Array, mask: Array | None) -> tuple[Any, None]:
        total, first = carry
        fine = xp.all(xp.isfinite(v), axis=-1, keepdims=True)
        one = xp.ones_like(fine, dtype=v.dtype)
        # the last columns count values, and those that are not finite: with these, other rows' sums would be NaN too
        values = xp.concat([xp.where(fine, v, 0.0), one, xp.where(fine, 0.0, one)], axis=-1)
        values = values if mask is None else xp.where(mask, values, 0.0)
        sums = xp.cumulative_sum(values, axis=-2, include_initial=True)
        count = v.shape[-2]
        for edge, sign in ((stop, 1.0), (start, -1.0)):
            place = edge - first
            place = xp.where(place < 0, 0, xp.where(place > count, count, place))
            total = total + sign * gather_rows(xp, sums, place)
        return (total, first + count), None

    first = xp.zeros((), dtype=start.dtype, device=place_of(v))
    columns = [v, None if key_mask is None else key_mask[..., None]]
    size = rows_per_block(max(1, math.prod(batch)) * (d_v + 2))
    (total, _), _ = fold_blocks(add, (total, first), columns, size, xp=xp)
    mean = divide_or_zero(xp, total[..., :-2], total[..., -2:-1])
    return xp.where(total[..., -1:] > 0, math.nan, mean)
