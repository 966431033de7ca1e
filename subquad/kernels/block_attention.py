"""Softmax attention in which each row sees an interval of keys, or of listed blocks of keys: output and log-sum-exp.

    out[i] = Σ_j exp(x[i, j]) v[j] / Σ_j exp(x[i, j]),    lse[i] = log Σ_j exp(x[i, j]),    x[i, j] = s q[i]·k[j]

The sums run over the keys that row i sees. Causality, windows, packed documents and counts of visible keys are all
intervals [start[i], stop[i]) of places (`subquad.kernels.visibility`), and intervals intersect. What no interval can
say, random blocks or buckets of a sorted sequence, is a list of key blocks for each block of rows. Outputs over two
disjoint sets of keys join by their log-sum-exp (`join`), so that a method may be planned in parts.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import BLOCK_ELEMENTS, fold_blocks, rows_per_block, take_rows
from subquad.core.dtypes import common_dtype, compute_dtype
from subquad.core.gather import gather_rows
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.max_shift import divide_or_zero, finite_shift
from subquad.kernels.softmax_attention import MANY_KEYS, Carry, absorb_keys, no_keys


def batch_of(
    arrays: dict[str, Array | None], of_rows: dict[str, Array | None], key_mask: Array | None
) -> tuple[int, ...]:
    """The common batch shape of arrays (..., rows, columns), of arrays (..., rows) and of the mask."""
    shapes = {name: x.shape[:-2] for name, x in arrays.items() if x is not None}
    shapes |= {name: x.shape[:-1] for name, x in of_rows.items() if x is not None}
    return broadcast_batch(**shapes, key_mask=None if key_mask is None else key_mask.shape[:-1])


def outputs(
    q: Array, k: Array, v: Array, start: Array, stop: Array, blocks: Array | None, place: Array | None,
    avoid: Array | None, met_q: Array | None, met_k: Array | None, pairs: Array | None,
    bias: Array | None, /, *, scale: float, size: int, softcap: float | None = None, wide: bool = False,
    key_mask: Array | None = None,
) -> tuple[Like, ...]:  # fmt: skip
    """Shape and dtype of the outputs of `block_attention`."""
    matrices = {"q": q, "k": k, "v": v, "blocks": blocks, "met_q": met_q, "met_k": met_k, "pairs": pairs, "bias": bias}
    batch = batch_of(matrices, {"start": start, "stop": stop, "place": place, "avoid": avoid}, key_mask)
    xp, n = namespace_of(q), q.shape[-2]
    compute = compute_dtype(xp, q, k, v)
    return Like((*batch, n, v.shape[-1]), compute if wide else common_dtype(xp, q, k, v)), Like((*batch, n), compute)


@kernel(outputs=outputs, options={"softcap": None, "wide": False, "key_mask": None}, reads_half=True)
def block_attention(
    q: Array, k: Array, v: Array, start: Array, stop: Array, blocks: Array | None, place: Array | None,
    avoid: Array | None, met_q: Array | None, met_k: Array | None, pairs: Array | None,
    bias: Array | None, /, *, scale: float, size: int, softcap: float | None = None, wide: bool = False,
    key_mask: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Softmax attention (..., n, d_v) over the keys that each row sees, and its log-sum-exp (..., n).

    A row that sees no key gives 0 and −∞. q, k and v may have half precision in place of float32; the output has it if
    all have the same, unless it is `wide`: one that is joined with another must not be rounded before. All arrays but
    these are None where they do not restrict anything:

        start, stop    (..., n)              row i sees keys at the places start[i] … stop[i] − 1
        blocks         (..., q_blocks, r)    the blocks of `size` keys that each block of `size` rows reads, each once;
                                             −1 for none. Without the list, rows read all keys of their interval
        place          (..., n_kv)           the place of each key; without it key j is at place j
        avoid          (..., n)              a place that the row does not see
        met_q, met_k   (..., n or n_kv, c)   row i does not see key j if met_q[i] − met_k[j] is 0 or 1 in some column
        pairs, bias    (..., n, n_kv)        whether the row sees the key; what is added to logits. Not with `blocks`

    A logit x = s q·k becomes c tanh(x / c) for a `softcap` c, then the bias is added.
    """
    xp = namespace_of(q)
    like, _ = outputs(
        q, k, v, start, stop, blocks, place, avoid, met_q, met_k, pairs, bias, scale=scale, size=size, key_mask=key_mask
    )
    batch = like.shape[:-2]
    if q.shape[-2] == 0:
        joined = xp.zeros((*batch, 0, v.shape[-1] + 1), dtype=q.dtype, device=place_of(q))
        return joined[..., :-1], joined[..., -1]
    in_order = place is None
    if place is None:
        place = xp.arange(k.shape[-2], dtype=start.dtype, device=place_of(q))
    rows = [q, *(None if x is None else x[..., None] for x in (start, stop, avoid)), met_q]
    keys = [k, v, None if key_mask is None else key_mask[..., None], place[..., None], met_k]
    if blocks is None or k.shape[-2] == 0:  # of no keys there are no blocks to gather
        joined = _over_intervals(xp, batch, rows, keys, pairs, bias, scale, softcap, in_order=in_order)
    else:
        joined = _over_lists(xp, batch, rows, keys, blocks, size, scale, softcap)
    return joined[..., :-1], joined[..., -1]


def _over_intervals(
    xp: ModuleType, batch: tuple[int, ...], rows: list[Any], keys: list[Any], pairs: Array | None, bias: Array | None,
    scale: float, softcap: float | None, *, in_order: bool,
) -> Array:  # fmt: skip
    """(out, lse) side by side, for rows that read all keys of their interval; `in_order`: key j is at place j."""
    k, d_v, backend = keys[0], keys[1].shape[-1], backend_of(xp)
    n_kv = k.shape[-2]
    heads = max(1, math.prod(batch)) * backend.items_behind(rows[0], *keys[:2])
    size = rows_per_block(heads * (max(n_kv, 1) if backend.holds(n_kv <= MANY_KEYS) else MANY_KEYS))

    def attend(_: None, q: Array, start: Array, stop: Array, avoid: Any, met_q: Any, pairs: Any, bias: Any) -> Any:
        rows, count = (q * scale, start, stop, avoid, met_q), q.shape[-2]
        columns = [*keys, *(None if x is None else xp.matrix_transpose(x) for x in (pairs, bias))]
        if in_order and 0 not in start.shape and backend.is_concrete(q, k, start, stop):
            first, last = max(int(xp.min(start)), 0), min(int(xp.max(stop)), n_kv)
            columns = take_rows(columns, min(first, n_kv), max(last, min(first, n_kv)))

        def absorb(carry: Carry, k: Array, v: Array, mask: Any, place: Array, met_k: Any, pairs: Any, bias: Any) -> Any:
            seen = sees(xp, *rows[1:], place, met_k)
            seen = seen if pairs is None else seen & xp.matrix_transpose(pairs)
            change = changes(xp, softcap, None if bias is None else xp.matrix_transpose(bias))
            return absorb_keys(xp, carry, rows[0], k, v, mask, seen, change), None

        carry = no_keys(xp, q, (*batch, count), d_v)
        if backend.holds(columns[0].shape[-2] > 0):
            size_kv = rows_per_block(heads * (max(count, 1) if backend.holds(count <= size) else size))
            carry, _ = fold_blocks(absorb, carry, columns, size_kv, xp=xp)
        return None, _finish(xp, carry)

    return fold_blocks(attend, None, [*rows, pairs, bias], size, xp=xp)[1]


def _over_lists(
    xp: ModuleType, batch: tuple[int, ...], rows: list[Any], keys: list[Any], blocks: Array, size: int, scale: float,
    softcap: float | None,
) -> Array:  # fmt: skip
    """(out, lse) side by side, for blocks of rows that read listed blocks of keys, which are gathered."""
    q, d_v, backend, where = rows[0], keys[1].shape[-1], backend_of(xp), place_of(rows[0])
    n, (k, v) = q.shape[-2], keys[:2]
    d, n_kv, (count, r) = q.shape[-1], k.shape[-2], blocks.shape[-2:]
    widths = [None if x is None else x.shape[-1] for x in rows]
    grouped = [None if x is None else as_blocks(xp, x, count, size) for x in rows]
    within = xp.arange(size, dtype=blocks.dtype, device=where)

    def attend(_: None, *chunk: Any) -> Any:
        *given, listed = chunk
        turned: list[Any] = [
            None if x is None else xp.reshape(x, (*x.shape[:-1], size, width))
            for x, width in zip(given, widths, strict=True)
        ]
        q, start, stop, avoid, met_q = turned
        index = listed[..., None] * size + within
        index = xp.reshape(index, (*listed.shape[:-1], r * size))  # (..., blocks, r · size)
        exists = (index >= 0) & (index < n_kv)
        index = xp.where(exists, index, 0)

        k, v, mask, place, met_k = (None if x is None else gather_rows(xp, x, index, axes=2) for x in keys)
        seen = sees(xp, start, stop, avoid, met_q, place, met_k) & exists[..., None, :]
        carry = no_keys(xp, q, (*batch, *q.shape[-3:-1]), d_v)
        carry = absorb_keys(xp, carry, q * scale, k, v, mask, seen, changes(xp, softcap, None))
        joined = _finish(xp, carry)
        return None, xp.reshape(joined, (*joined.shape[:-2], size * (d_v + 1)))

    heads = max(1, math.prod(batch)) * backend.items_behind(q, k, v)
    width = heads * r * size * max(size, d + d_v)  # of logits, or of gathered keys and values, for a block of rows
    _, joined = fold_blocks(attend, None, [*grouped, blocks], max(1, BLOCK_ELEMENTS // max(width, 1)), xp=xp)
    assert joined is not None
    return xp.reshape(joined, (*joined.shape[:-2], count * size, d_v + 1))[..., :n, :]


def as_blocks(xp: ModuleType, x: Array, count: int, size: int) -> Array:
    """Rows (..., n, width) as `count` blocks (..., count, size · width), filled up with zeros: those see no key."""
    lacking = count * size - x.shape[-2]
    if lacking:
        zeros = xp.zeros((*x.shape[:-2], lacking, x.shape[-1]), dtype=x.dtype, device=place_of(x))
        x = xp.concat([x, zeros], axis=-2)
    return xp.reshape(x, (*x.shape[:-2], count, size * x.shape[-1]))


def sees(
    xp: ModuleType, start: Array, stop: Array, avoid: Array | None, met_q: Array | None, place: Array,
    met_k: Array | None,
) -> Array:  # fmt: skip
    """Whether each row sees each key, (..., rows, keys); the arrays are (..., rows or keys, columns)."""
    place = xp.matrix_transpose(place)
    seen = (place >= start) & (place < stop)
    if avoid is not None:
        seen = seen & (place != avoid)
    if met_q is not None and met_k is not None:
        seen = seen & ~met(xp, met_q, met_k)
    return seen


def met(xp: ModuleType, met_q: Array, met_k: Array) -> Array:
    """Whether met_q − met_k is 0 or 1 in some column, (..., rows, keys), of arrays (..., rows or keys, columns)."""
    found: Any = None
    for column in range(met_q.shape[-1]):
        distance = met_q[..., column : column + 1] - xp.matrix_transpose(met_k[..., column : column + 1])
        near = (distance == 0) | (distance == 1)
        found = near if found is None else found | near
    return found


def changes(xp: ModuleType, softcap: float | None, bias: Array | None) -> Any:
    """A function of logits that caps them softly and adds the bias; None if it would change nothing."""
    if softcap is None and bias is None:
        return None

    def change(logits: Array) -> Array:
        logits = logits if softcap is None else softcap * xp.tanh(logits / softcap)
        return logits if bias is None else logits + bias

    return change


def _finish(xp: ModuleType, carry: Carry) -> Array:
    """(out, lse) side by side, (..., rows, d_v + 1), of the carry after the last key."""
    shift, denominator, numerator = carry
    none = denominator == 0
    lse = xp.where(none, -math.inf, finite_shift(xp, shift) + xp.log(xp.where(none, 1.0, denominator)))
    return xp.concat([divide_or_zero(xp, numerator, denominator), lse], axis=-1)


def join(xp: ModuleType, *parts: tuple[Array, Array]) -> tuple[Array, Array]:
    """(out, lse) over disjoint sets of keys, from (out, lse) over each; where no part sees a key, 0 and −∞."""
    level = parts[0][1]
    for _, lse in parts[1:]:
        level = xp.maximum(level, lse)
    finite = finite_shift(xp, level)
    weights = [xp.exp(lse - finite) for _, lse in parts]
    total = sum(weights[1:], start=weights[0])
    numerator = sum((w[..., None] * out for w, (out, _) in zip(weights[1:], parts[1:], strict=True)),
                    start=weights[0][..., None] * parts[0][0])  # fmt: skip
    none = total == 0
    lse = xp.where(none, -math.inf, finite + xp.log(xp.where(none, 1.0, total)))
    return divide_or_zero(xp, numerator, total[..., None]), lse
