"""Exact attention at some rows of a call, and what it says of the whole: the ground of `estimate_error` and `Auto`.

    exact       o[i] = Σ_j p[i, j] v[j],    p[i, j] = exp(x[i, j] − lse[i]),    lse[i] = log Σ_j exp(x[i, j])
    mean        the mean of the values that row i sees: what attention that ignores q and k would give
    effective   1 / Σ_j p[i, j]² = exp(2 lse[i] − log Σ_j exp(2 x[i, j])), the number of keys of equal weight

The sums of the last one are exact attention with twice the scale, and run over `SPREAD_ROWS` of the rows alone: r rows
of n cost r / n of exact attention, and the rest together a sixth of that.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

from subquad.attention.call import AttentionCall
from subquad.attention.restrictions import sight_of
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.gather import gather_rows
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.block_attention import block_attention
from subquad.kernels.max_shift import divide_or_zero
from subquad.kernels.visibility import alignment
from subquad.random import draw_rows

SPREAD_ROWS = 32  # rows at which the number of effective keys is computed


class Sample(NamedTuple):
    """Sampled rows of a call; arrays in the compute dtype, with grouped heads unfolded."""

    numbers: Array  # int32 (r,), ascending
    exact: Array  # (..., heads, r, d_v)
    mean: Array  # (..., heads, r, d_v)
    seeing: Array  # bool (..., heads, r): whether the row sees a key
    effective: Array  # (..., heads, s): effective keys of s ≤ r of the rows, 0 where a row sees none
    out_of: int  # the number of rows that were sampled from
    all_see: bool  # whether each row surely sees a key


def sample(call: AttentionCall, rows: int, seed: int, drawn: Any = None) -> Sample:
    """Exact attention at `rows` rows of a call with its restrictions, in memory that grows with the rows alone.

    The rows depend on the number of queries and the seed, and on nothing else, those before the first key being left
    out; unless their numbers are given, as integers on the host.
    """
    xp, where, n_kv = call.xp, place_of(call.q), call.k.shape[-2]
    _, early = alignment(call.q.shape[-2], n_kv) if call.causal else (0, 0)
    n = call.q.shape[-2]
    early = min(early, n)
    drawn = backend_of(xp).on_host(draw_rows, early, n, rows, seed) if drawn is None else drawn
    numbers = xp.asarray(drawn, device=where)
    _, start, stop = (xp.take(x, numbers, axis=-1) for x in sight_of(call))
    q = xp.take(call.q, numbers, axis=-2)
    none = (None,) * 7
    given: dict[str, Any] = {"size": 1, "key_mask": call.key_mask}
    out, lse = block_attention(q, call.k, call.v, start, stop, *none, scale=call.scale, **given)[:2]
    few = slice(None, None, max(1, numbers.shape[0] // SPREAD_ROWS))
    _, lse_twice = block_attention(
        q[..., few, :], call.k, call.k[..., :1], start[..., few], stop[..., few], *none, scale=2 * call.scale, **given
    )
    seeing = lse != -float("inf")
    some = seeing[..., few]
    once, twice = (xp.where(some, x, 0.0) for x in (lse[..., few], lse_twice))  # −∞ − −∞ is NaN
    effective = xp.exp(2 * once - twice)
    mean = visible_means(xp, call.v, call.key_mask, start, stop)
    batch = call.batch(out=out.shape[:-2])

    def whole(x: Array) -> Array:
        return call.arrangement.heads.unfold(xp.broadcast_to(x, (*batch, *x.shape[-2:])))

    return Sample(
        numbers,
        whole(out),
        whole(mean),
        whole(seeing[..., None])[..., 0],
        whole(xp.where(some, effective, 0.0)[..., None])[..., 0],
        n - early,
        n_kv > 0 and call.key_mask is None and call.restrictions is None,
    )


def visible_means(xp: ModuleType, v: Array, key_mask: Array | None, start: Array, stop: Array) -> Array:
    """The means (..., r, d_v) of the values at the places start … stop − 1 that the mask shows; 0 of none.

    O(n_kv d_v) operations: sums over intervals are differences of cumulative sums, block by block.
    """
    mask = None if key_mask is None else key_mask.shape[:-1]
    batch, d_v = broadcast_batch(v=v.shape[:-2], rows=start.shape[:-1], key_mask=mask), v.shape[-1]
    total = xp.zeros((*batch, start.shape[-1], d_v + 1), dtype=v.dtype, device=place_of(v))
    if v.shape[-2] == 0:
        return total[..., :-1]

    def add(carry: Any, v: Array, mask: Array | None) -> tuple[Any, None]:
        total, first = carry
        values = xp.concat([v, xp.ones_like(v[..., :1])], axis=-1)  # the last column counts
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
    size = rows_per_block(max(1, math.prod(batch)) * (d_v + 1))
    (total, _), _ = fold_blocks(add, (total, first), columns, size, xp=xp)
    return divide_or_zero(xp, total[..., :-1], total[..., -1:])
