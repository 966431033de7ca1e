"""Softmax attention to clusters of keys, each of which enters as its centroid with the keys that a row has not read.

    out[i] = Σ_c e^{w[i, c]} v̄[c] / Σ_c e^{w[i, c]},    lse[i] = log Σ_c e^{w[i, c]}
    w[i, c] = s q[i]·μ[c] + s² Σ_l q[i, l]² σ²[c, l] / 4 + log n[i, c]

n[i, c] is the number of keys of cluster c that row i sees and has not read otherwise; μ, σ² and v̄ are mean, variance
and mean value of all keys of the cluster. Joined with the output over the keys that were read (`block_attention.join`),
each key counts once.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import BLOCK_ELEMENTS, fold_blocks
from subquad.core.gather import gather_rows
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.kernels.block_attention import as_blocks, batch_of, met
from subquad.kernels.clustered_attention import SPREAD
from subquad.kernels.max_shift import bounded, divide_or_zero, finite_shift

FEWEST = 16  # rows that a block is not cut below


def outputs(
    q: Array, means: Array, spread: Array, mean_values: Array, members: Array, place: Array | None, blocks: Array,
    start: Array | None, stop: Array | None, met_q: Array | None, met_k: Array | None, /, *, scale: float, size: int,
    per_block: int, length: int,
) -> tuple[Like, ...]:  # fmt: skip
    """Shape and dtype of the outputs of `centroid_attention`."""
    matrices = {"q": q, "means": means, "spread": spread, "mean_values": mean_values, "members": members,
                "blocks": blocks, "met_q": met_q, "met_k": met_k}  # fmt: skip
    batch = batch_of(matrices, {"place": place, "start": start, "stop": stop}, None)
    return Like((*batch, q.shape[-2], mean_values.shape[-1]), q.dtype), Like((*batch, q.shape[-2]), q.dtype)


@kernel(outputs=outputs, options={})
def centroid_attention(
    q: Array, means: Array, spread: Array, mean_values: Array, members: Array, place: Array | None, blocks: Array,
    start: Array | None, stop: Array | None, met_q: Array | None, met_k: Array | None, /, *, scale: float, size: int,
    per_block: int, length: int,
) -> tuple[Array, Array]:  # fmt: skip
    """Softmax attention (..., n, d_v) to centroids, and its log-sum-exp (..., n).

    A row without any key left gives 0 and −∞. Clusters c = b · per_block … (b + 1) · per_block − 1 are those of the
    key block b.

        means, spread    (..., C, d)             mean and variance of the keys of a cluster
        mean_values      (..., C, d_v)           mean of its values
        members          (..., C, m)             the places of its keys, int32; −1 for none
        place            (..., n)                row i sees the blocks of `length` keys that end before the place
                                                 place[i]; None: all
        blocks           (..., q_blocks, r)      the key blocks that each block of `size` rows has read, each once; −1
                                                 for none
        start, stop      (..., n)                of these, row i has read the keys at the places start[i] … stop[i] − 1;
                                                 None: all
        met_q, met_k     (..., n or C · m, c)    row i has read key j too if met_q[i] − met_k[j] is 0 or 1 in some
                                                 column. None with `start`
    """
    xp, where = namespace_of(q), place_of(q)
    out, lse = outputs(q, means, spread, mean_values, members, place, blocks, start, stop, met_q, met_k, scale=scale,
                       size=size, per_block=per_block, length=length)  # fmt: skip
    batch, n, d_v = out.shape[:-2], q.shape[-2], mean_values.shape[-1]
    clusters, m = members.shape[-2:]
    if n == 0 or clusters == 0:
        nothing = xp.zeros(out.shape, dtype=out.dtype, device=where)
        return nothing, xp.full(lse.shape, -math.inf, dtype=lse.dtype, device=where)
    per_row = max(1, math.prod(batch)) * backend_of(xp).items_behind(q, means, mean_values)
    per_row *= (clusters if isinstance(clusters, int) else 1) * (3 if met_q is None else 3 + m)
    size, blocks = _cut(xp, blocks, n, size, per_row)
    count, r = blocks.shape[-2:]
    rows = [q, *(None if x is None else x[..., None] for x in (place, start, stop)), met_q]
    widths = [None if x is None else x.shape[-1] for x in rows]

    numbers = xp.arange(clusters // per_block, dtype=blocks.dtype, device=where)
    ends = xp.broadcast_to((numbers[:, None] + 1) * length, (clusters // per_block, per_block))
    ends = xp.reshape(ends, (clusters,))  # a floor division of places is wrong where PyTorch's compiler fuses it
    exists = members >= 0
    total = xp.sum(xp.astype(exists, q.dtype), axis=-1)[..., None, None, :]
    of_blocks = xp.reshape(members, (*members.shape[:-2], clusters // per_block, per_block * m))
    # 0 · NaN is NaN: a value that is not finite must reach the rows that see its cluster and no others
    fine = xp.all(xp.isfinite(mean_values), axis=-1)[..., None, None, :]
    values = xp.where(xp.isfinite(mean_values), mean_values, 0.0)[..., None, :, :]
    across, variances = (xp.matrix_transpose(x)[..., None, :, :] for x in (means, spread))

    def left_of(rows: tuple[Any, ...], listed: Array) -> Array:
        """How many keys of each cluster each row has not read, (..., blocks, rows, C)."""
        start, stop, met_q = rows
        is_listed = listed[..., None] == numbers  # (..., blocks, r, key blocks)
        if start is None:
            whole = xp.any(is_listed, axis=-2)[..., None]
            whole = xp.reshape(xp.broadcast_to(whole, (*whole.shape[:-1], per_block)), (*whole.shape[:-2], 1, clusters))
            left = xp.where(whole, 0.0, total)
            if met_q is None or met_k is None:
                return left
            read = met(xp, met_q, met_k[..., None, :, :])
            read = xp.reshape(read, (*read.shape[:-1], clusters, m)) & exists[..., None, None, :, :]
            left = left - xp.sum(xp.astype(read, total.dtype), axis=-1)
            return xp.where(left > 0, left, 0.0)
        own = gather_rows(xp, of_blocks, xp.where(listed < 0, 0, listed), axes=2)  # (..., blocks, r, per_block · m)
        own = xp.reshape(xp.where((listed < 0)[..., None], -1, own), (*own.shape[:-2], 1, r * per_block * m))
        read = xp.astype((own >= 0) & (own >= start) & (own < stop), total.dtype)
        read = xp.sum(xp.reshape(read, (*read.shape[:-1], r, per_block, m)), axis=-1)
        found = xp.matrix_transpose(read) @ xp.astype(is_listed, total.dtype)[..., None, :, :]
        found = xp.matrix_transpose(found)  # (..., blocks, rows, key blocks, per_block)
        return total - xp.reshape(found, (*found.shape[:-2], clusters))

    def attend(_: None, *chunk: Any) -> tuple[None, Array]:
        *given, listed = chunk
        turned: list[Any] = [
            None if x is None else xp.reshape(x, (*x.shape[:-1], size, width))
            for x, width in zip(given, widths, strict=True)
        ]
        q, place, *others = turned
        q = q * scale
        left = left_of(tuple(others), listed)
        seen = left > 0 if place is None else (left > 0) & (ends <= place)
        variance = bounded(xp, SPREAD * (bounded(xp, q * q) @ variances))
        weight = q @ across + variance + xp.log(xp.where(seen, left, 1.0))
        weight = xp.where(seen, weight, -math.inf)
        shift = finite_shift(xp, xp.max(weight, axis=-1, keepdims=True))
        weight = xp.exp(weight - shift)
        denominator = xp.sum(weight, axis=-1, keepdims=True)
        numerator = xp.where(xp.any(seen & ~fine, axis=-1, keepdims=True), math.nan, weight @ values)
        none = denominator == 0
        level = xp.where(none, -math.inf, shift + xp.log(xp.where(none, 1.0, denominator)))
        level = xp.broadcast_to(level, (*numerator.shape[:-1], 1))  # values may have more batch axes than weights
        joined = xp.concat([divide_or_zero(xp, numerator, denominator), level], axis=-1)
        joined = xp.broadcast_to(joined, (*batch, *joined.shape[-3:]))
        return None, xp.reshape(joined, (*joined.shape[:-2], size * (d_v + 1)))

    arrays = [None if x is None else as_blocks(xp, x, count, size) for x in rows]
    _, joined = fold_blocks(attend, None, [*arrays, blocks], max(1, BLOCK_ELEMENTS // (per_row * size)), xp=xp)
    assert joined is not None
    joined = xp.reshape(joined, (*joined.shape[:-2], count * size, d_v + 1))[..., :n, :]
    return joined[..., :-1], joined[..., -1]


def _cut(xp: ModuleType, blocks: Array, n: int, size: int, per_row: int) -> tuple[int, Array]:
    """(rows of a block, the lists of all blocks), with blocks cut in halves until their temporaries are small."""
    parts = 1
    while size % 2 == 0 and size // 2 >= FEWEST and size * per_row > BLOCK_ELEMENTS:
        size, parts = size // 2, 2 * parts
    if parts == 1:
        return size, blocks
    of_part = xp.arange(-(-n // size), dtype=xp.int32, device=place_of(blocks)) // parts
    return size, xp.take(blocks, of_part, axis=-2)
