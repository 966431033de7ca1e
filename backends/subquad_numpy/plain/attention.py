"""Attention on NumPy with reused memory: one head after the other, in blocks that stay in a core's cache.

The sums are blocked as in the generic kernels. Two things make this form faster: scratch memory is written again and
again in place of fresh temporaries, whose page faults cost more than the arithmetic; and matrix products are large and
two-dimensional.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from subquad.backend import Accepts, Call, Override
from subquad.kernels.feature_map import Exponential
from subquad.kernels.max_shift import finite_shift
from subquad.kernels.visibility import Visibility

Array = np.ndarray[Any, Any]
Ranges = list[tuple[tuple[int, int], Array | None]]  # (start, stop) of keys, and the pairs (rows, keys) that are hidden

ELEMENTS = 2**17  # elements of a block's scratch: half a megabyte of float32, within a second-level cache
ROWS, SMALL_KEYS = 2048, 512  # maximum rows of a block; up to so many keys make one block
MOST_KEYS = 2**14  # maximum keys of a block, for one query or a small number of them


def feature_summarize(
    k: Array, v: Array, shift: Array | None, numerator: Array | None, denominator: Array | None, /, *weights: Array,
    phi: Exponential, key_mask: Array | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The kernel `feature_summarize` for φ(k) = exp(k W_k − h |k|²), with one W_k for all batch items."""
    W_k, half_scale = weights[0], abs(phi.scale) / 2
    d, m = W_k.shape
    rows, log = _scratch(d, m, k.dtype)
    directions = np.vstack([W_k, np.ones_like(W_k[:1])])  # the row of ones meets −h |k|², the last number of a key
    batch, k, v, key_mask = _common_batch(k, v, mask=key_mask)
    made = (np.empty((*batch, *tail), k.dtype) for tail in ((m, 1), (m, v.shape[-1]), (m, 1)))
    new, new_numerator, new_denominator = made
    for item in np.ndindex(batch):
        mask = None if key_mask is None else key_mask[item]
        sums = _summarize(k[item], v[item], mask, directions, half_scale, rows, log)
        new[item][:, 0], new_numerator[item], new_denominator[item][:, 0] = sums
    if shift is None:
        return new, new_numerator, new_denominator
    largest = np.maximum(shift, new)
    finite = finite_shift(np, largest)
    fade, fade_new = np.exp(shift - finite), np.exp(new - finite)
    return largest, numerator * fade + new_numerator * fade_new, denominator * fade + new_denominator * fade_new


def feature_attend(
    q: Array, shift: Array, numerator: Array, denominator: Array, /, *weights: Array, phi: Exponential
) -> Array:
    """The kernel `feature_attend` for φ(q) = exp(q W_q)."""
    W_q = weights[1]
    rows, log = _scratch(*W_q.shape, q.dtype)
    directions = np.vstack([W_q, np.ones_like(W_q[:1])])  # the last row becomes the shift of each item's state
    batch, q, start, numerator, denominator, _ = _common_batch(q, finite_shift(np, shift), numerator, denominator)
    out = np.empty((*batch, q.shape[-2], numerator.shape[-1]), q.dtype)
    for item in np.ndindex(batch):
        directions[-1] = start[item][:, 0]
        _read(q[item], directions, numerator[item], denominator[item][:, 0], rows, log, out[item])
    return out


def _scratch(d: int, m: int, dtype: Any) -> tuple[Array, Array]:
    """Scratch memory for a block: its rows, (rows, d + 1), and their exponents, (rows, m)."""
    size = max(64, min(ROWS, ELEMENTS // max(1, m)))
    return np.empty((size, d + 1), dtype), np.empty((size, m), dtype)


def _summarize(
    k: Array, v: Array, mask: Array | None, weights: Array, half_scale: float, rows: Array, log: Array
) -> tuple[Array, Array, Array]:
    """(shift, Σ φ(k) vᵀ, Σ φ(k)) of one head; the sums are over exp(shift)."""
    d, m = k.shape[-1], weights.shape[-1]
    shift = np.full(m, -math.inf, k.dtype)
    kv, k_sum = np.zeros((m, v.shape[-1]), k.dtype), np.zeros(m, k.dtype)
    part = np.empty_like(kv)
    ones = np.ones(len(rows), k.dtype)
    for start in range(0, len(k), len(rows)):
        block, values = k[start : start + len(rows)], v[start : start + len(rows)]
        count = len(block)
        augmented, exponents = rows[:count], log[:count]
        if mask is not None:
            keep = mask[start : start + count]
            block, values = (np.where(keep[:, None], x, 0) for x in (block, values))
        augmented[:, :d] = block
        augmented[:, d] = 0
        if half_scale:  # |k|² overflows long before k itself, and 0 · ∞ is NaN
            np.multiply(np.einsum("ij,ij->i", block, block), -half_scale, out=augmented[:, d])
        np.matmul(augmented, weights, out=exponents)
        if mask is not None:
            exponents[~keep] = -math.inf
        new = np.maximum(shift, exponents.max(axis=0))
        finite = np.where(new == -math.inf, 0, new)
        np.subtract(exponents, finite, out=exponents)
        np.exp(exponents, out=exponents)
        fade = np.exp(shift - finite)
        kv *= fade[:, None]
        kv += np.matmul(exponents.T, values, out=part)
        k_sum *= fade
        k_sum += ones[:count] @ exponents
        shift = new
    return shift, kv, k_sum


def _read(q: Array, weights: Array, kv: Array, k_sum: Array, rows: Array, log: Array, out: Array) -> None:
    """Write the output of the queries of one head into `out`."""
    d = q.shape[-1]
    for start in range(0, len(q), len(rows)):
        block = q[start : start + len(rows)]
        count = len(block)
        augmented, exponents, result = rows[:count], log[:count], out[start : start + count]
        augmented[:, :d], augmented[:, d] = block, 1
        np.matmul(augmented, weights, out=exponents)
        np.subtract(exponents, exponents.max(axis=1, keepdims=True), out=exponents)
        np.exp(exponents, out=exponents)
        np.matmul(exponents, kv, out=result)
        _divide(result, (exponents @ k_sum)[:, None])


def softmax_attention(
    q: Array, k: Array, v: Array, /, *, scale: float, visible: Visibility | None = None, key_mask: Array | None = None
) -> Array:
    """The kernel `softmax_attention`; small heads pass in groups."""
    n, n_kv, d_v = q.shape[-2], k.shape[-2], v.shape[-1]
    shape, q, k, v, key_mask = _common_batch(q, k, v, mask=key_mask)
    if not shape:
        q, k, v, key_mask = q[None], k[None], v[None], None if key_mask is None else key_mask[None]
    *batch, heads = shape or (1,)
    size_kv = n_kv if n_kv <= SMALL_KEYS else max(SMALL_KEYS, min(MOST_KEYS, ELEMENTS // max(1, min(n, SMALL_KEYS))))
    size = min(max(64, min(ROWS, ELEMENTS // size_kv)), max(n, 1))
    group = max(1, min(heads, ELEMENTS // (size * size_kv)))
    memory, out = np.empty(group * size * size_kv, q.dtype), np.empty((*batch, heads, n, d_v), q.dtype)
    for item in np.ndindex(*batch):
        for first in range(0, heads, group):
            mine = (*item, slice(first, first + group))
            mask = None if key_mask is None else key_mask[mine]
            queries, keys, values, result = q[mine], k[mine], v[mine], out[mine]
            if mask is not None:
                keys, values = (np.where(mask[..., None], x, 0) for x in (keys, values))
            for start in range(0, n, size):
                rows = queries[:, start : start + size] * scale
                ranges = _ranges(visible, start, rows.shape[-2], n, n_kv, size_kv)
                _attend(rows, keys, values, mask, ranges, memory, result[:, start : start + size])
    return out.reshape(*shape, n, d_v)


def _ranges(visible: Visibility | None, first: int, count: int, n: int, n_kv: int, size: int) -> Ranges:
    """The ranges of at most `size` keys that some of the rows from `first` on see, with the pairs that are hidden."""
    whole, parts = ((0, n_kv), ()) if visible is None else visible.spans(first, count, n, n_kv)
    found: Ranges = [((start, min(start + size, whole[1])), None) for start in range(*whole, size)]
    for begin, end in parts:
        for start in range(begin, end, size):
            keys = start, min(start + size, end)
            assert visible is not None
            found.append((keys, ~visible.pairs(np, (first, first + count), keys, n_kv - n, None)))
    return found


def _attend(q: Array, k: Array, v: Array, mask: Array | None, ranges: Ranges, memory: Array, out: Array) -> None:
    """Write the attention of a block of queries of some heads into `out`: online softmax over ranges of keys."""
    heads, count, _ = q.shape
    if not ranges:
        out[...] = 0
        return
    maximum: Any = -math.inf  # arrays after the first range
    total: Any = 0.0
    part = out if len(ranges) == 1 else np.empty_like(out)
    for place, ((start, stop), hidden) in enumerate(ranges):
        logits = memory[: heads * count * (stop - start)].reshape(heads, count, stop - start)
        values = v[:, start:stop]
        np.matmul(q, k[:, start:stop].swapaxes(-1, -2), out=logits)
        if mask is not None:
            np.copyto(logits, -math.inf, where=~mask[:, None, start:stop])
        bad: Any = None
        if hidden is not None:
            np.copyto(logits, -math.inf, where=hidden)
            if not np.isfinite(values).all():  # 0 · NaN is NaN: it must reach the rows that see it and no others
                bad = ~np.isfinite(values).all(axis=-1)
                values = np.where(bad[..., None], 0, values)
        new = logits.max(axis=-1, keepdims=True)
        if place:
            new = np.maximum(maximum, new)
        finite = finite_shift(np, new)
        np.subtract(logits, finite, out=logits)
        np.exp(logits, out=logits)
        np.matmul(logits, values, out=part)
        if bad is not None and hidden is not None:
            part[(bad[:, None] & ~hidden).any(axis=-1)] = math.nan
        sums = logits @ np.ones((stop - start, 1), q.dtype)
        if place == 0:
            total = sums
            if part is not out:
                out[...] = part
        else:
            fade = np.exp(maximum - finite)
            total = total * fade + sums
            out *= fade
            out += part
        maximum = new
    _divide(out, total)


def _divide(out: Array, total: Array) -> None:
    """Divide the rows of `out` by the column `total` in place; a row that sees no key has total 0 and is 0 already."""
    out /= np.where(total == 0, 1, total)


def _common_batch(*arrays: Array, mask: Array | None = None) -> tuple[Any, ...]:
    """(batch shape, views of the arrays broadcast to that batch, view of the mask or None)."""
    shapes = [x.shape[:-2] for x in arrays] + ([] if mask is None else [mask.shape[:-1]])
    batch = np.broadcast_shapes(*shapes)
    views = [np.broadcast_to(x, (*batch, *x.shape[-2:])) for x in arrays]
    return batch, *views, None if mask is None else np.broadcast_to(mask, (*batch, mask.shape[-1]))


def _plain_exponentials(call: Call, first: int) -> str | None:
    """The reason why features with reused memory cannot take the feature map, whose weights are the last arrays."""
    phi, weights = call.static["phi"], call.arrays[first:]
    if not isinstance(phi, Exponential):
        return "the features are not plain exponentials"
    if len(weights) > 2:
        return "queries and keys are centred"
    W_k = weights[0]
    return "each item has directions of its own" if W_k is not None and W_k.ndim > 2 else None


def _some_key(call: Call) -> str | None:
    # the reason to decline a call without keys, or None
    k = call.arrays[1]
    return "there is no key" if k is not None and k.shape[-2] == 0 else None


_DTYPES, _MASK = ("float32", "float64", "float128"), frozenset({"key_mask"})

OVERRIDES = (
    Override(
        "feature_summarize",
        "in-place",
        feature_summarize,
        Accepts(_DTYPES, options=_MASK, also=partial(_plain_exponentials, first=5)),
    ),
    Override(
        "feature_attend", "in-place", feature_attend, Accepts(_DTYPES, also=partial(_plain_exponentials, first=4))
    ),
    Override(
        "softmax_attention",
        "in-place",
        softmax_attention,
        Accepts(_DTYPES, options=_MASK | {"visible"}, also=_some_key),
    ),
)
