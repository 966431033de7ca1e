"""Exact attention at some rows of a call, and what it says of the whole: the ground of `estimate_error` and `Auto`.

    exact       o[i] = Σ_j p[i, j] v[j],    p[i, j] = exp(x[i, j]) / Σ_j exp(x[i, j])
    mean        the mean of the values that row i sees: what attention that ignores q and k would give
    effective   1 / Σ_j p[i, j]², the number of keys of equal weight

One kernel computes them, at about r / n of the cost of exact attention for r of n rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from subquad.attention.call import AttentionCall
from subquad.attention.restrictions import sight_of
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.loading import backend_of
from subquad.kernels.sampled_attention import sampled_attention
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

    def of_rows(drawn: Any) -> tuple[Array, Array, Array]:
        numbers, sight = xp.asarray(drawn, device=where), sight_of(call)
        return numbers, xp.take(sight.start, numbers, axis=-1), xp.take(sight.stop, numbers, axis=-1)

    if drawn is None:
        kept: dict[Any, Any] = call.made_of(call.arrangement.owner(), "sampled rows", None, dict)  # the last ones
        found = kept.get((rows, seed))
        if found is None:
            found = of_rows(backend_of(xp).on_host(draw_rows, early, n, rows, seed))
            kept.clear()
            kept[rows, seed] = found
    else:
        found = of_rows(drawn)
    numbers, start, stop = found
    every = max(1, numbers.shape[0] // SPREAD_ROWS)
    out, lse, effective, mean = sampled_attention(
        call.q, call.k, call.v, start, stop, numbers, scale=call.scale, every=every, key_mask=call.key_mask
    )
    seeing = lse != -math.inf
    batch, is_folded = call.batch(out=out.shape[:-2]), call.arrangement.heads.groups != 1

    def whole(x: Array) -> Array:
        return call.arrangement.heads.unfold(
            x if x.shape[:-2] == batch else xp.broadcast_to(x, (*batch, *x.shape[-2:]))
        )

    def whole_rows(x: Array) -> Array:
        return whole(x[..., None])[..., 0] if is_folded or x.shape[:-1] != batch else x

    return Sample(
        numbers,
        whole(out),
        whole(mean),
        whole_rows(seeing),
        whole_rows(effective),
        n - early,
        n_kv > 0 and call.key_mask is None and call.restrictions is None,
    )
