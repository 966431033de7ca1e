"""Attention through exponential features, and softmax attention, on NumPy arrays by compiled kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import array_api_compat.numpy as xp
import numpy as np

from subquad.kernels._feature_map import Elu, Exponential, map_of
from subquad.kernels.feature_product import feature_product as dispatched_product
from subquad_numpy.features.attend import ATTEND_RECORD, attend_kernel
from subquad_numpy.features.operand import Operand, operands_of
from subquad_numpy.features.step import STEP_RECORD, block_rows, step_kernel
from subquad_numpy.features.summarize import SUMMARIZE_RECORD, summarize_kernel
from subquad_numpy.runtime.arguments import row_step, run, with_whole_rows

Array = np.ndarray[Any, Any]

generic_product = dispatched_product.__wrapped__  # type: ignore[attr-defined]

SUMMARY_CHUNK, MOST_CHUNKS = 4096, 16  # keys of a task; more than this many partial sums would cost memory
READING_CHUNK = 1024  # queries of a task
FEW_KEYS, QUERIES = 512, 256  # keys whose values stay in cache; queries that read all keys together


class Sums(NamedTuple):
    """What attention through features knows of the keys: Σ_j φ(k[j]) v[j]ᵀ and Σ_j φ(k[j]), over exp(shift)."""

    shift: Array  # (..., m)
    kv: Array  # (..., m, d_v)
    k_sum: Array  # (..., m)


def feature_product(q: Array, k: Array, v: Array, /, *, causal: bool = False, **options: Any) -> Array:
    """The kernel `feature_product` for features that are exponentials, or elu(y) + 1."""
    return causal_product(q, k, v, **options) if causal else product_and_sums(q, k, v, **options)[0]


class Trace(NamedTuple):
    """What the gradient of causal attention through features needs of the forward pass, from the first key on."""

    before: Sums  # over the keys that every row sees; shift is −∞ where there is none
    level: Array  # (..., n), log Σ_j w[i, j], ∞ where the row sees nothing
    shifts: Array  # (..., blocks, m), the shift before each block


def product_and_sums(
    q: Array, k: Array, v: Array, /, *, phi: Exponential | Elu, key_mask: Array | None = None,
    threads: int | None = None, out: Array | None = None,
) -> tuple[Array, Sums]:  # fmt: skip
    """The same, and what its gradient needs."""
    keys, queries = operands_of(phi)
    sums = _sums(k, v, keys, key_mask, threads)
    start = np.where(sums.shift == -math.inf, 0, sums.shift)
    if out is None:
        out = np.empty((*_batch(q, queries, sums), q.shape[-2], v.shape[-1]), q.dtype)
    _read(q, queries, start, sums.kv, sums.k_sum, threads, out)
    return out, Sums(start, sums.kv, sums.k_sum)


def causal_product(q: Array, k: Array, v: Array, /, **options: Any) -> Array:
    """The same, causal."""
    return causal_and_trace(q, k, v, **options)[0]


def causal_and_trace(
    q: Array, k: Array, v: Array, /, *, phi: Exponential | Elu, key_mask: Array | None = None,
    threads: int | None = None, out: Array | None = None, traced: bool = False,
) -> tuple[Array, Trace | None]:  # fmt: skip
    """The same, and if asked what its gradient needs, None where the compiled gradient cannot take the call.

    What exceeds the range of the compiled kernel is left to the generic form.
    """
    given = q, k, v
    n, n_kv, d_v = q.shape[-2], k.shape[-2], v.shape[-1]
    ahead, early = max(n_kv - n, 0), max(n - n_kv, 0)
    keys, queries = operands_of(phi)
    before, after = (None if key_mask is None else key_mask[..., x] for x in (slice(ahead), slice(ahead, None)))
    # keys that every row sees
    sums = _sums(k[..., :ahead, :], v[..., :ahead, :], keys, before, threads)
    batch = _batch(q, queries, sums)
    if out is None:
        out = np.empty((*batch, n, d_v), q.dtype)
    out[..., :early, :] = 0  # rows before the first key
    if n == early:
        return out, None
    own = sums.shift.ndim - 1
    sums = Sums(*(np.broadcast_to(x, (*batch, *x.shape[own:])) for x in sums))
    q, k, v = q[..., early:, :], k[..., ahead:, :], v[..., ahead:, :]
    rows = out if early == 0 else np.empty((*batch, n - early, d_v), q.dtype)
    blocks = -(-(n - early) // block_rows(q.dtype))
    trace = None
    if traced:
        shifts = np.empty((*batch, blocks, sums.shift.shape[-1]), q.dtype)
        trace = Trace(sums, np.full((*batch, n - early), math.nan, q.dtype), shifts)
    undone = _advance(q, k, v, queries, keys, after, sums, threads, rows, trace)
    if (undone < n - early).any():
        whole = generic_product(*given, phi=map_of(xp, phi, q.shape[-1]), causal=True, key_mask=key_mask)
        mine = np.arange(n - early)[:, None] < undone[..., None, None]
        rows[...] = np.where(mine, rows, whole[..., early:, :])
    if early:
        out[..., early:, :] = rows
    return out, None if trace is None or np.isnan(trace.level).any() else trace


def _batch(q: Array, queries: Operand, sums: Sums) -> tuple[int, ...]:
    """The batch shape of the whole call."""
    centers = () if queries.center is None else queries.center.shape[:-1]
    return np.broadcast_shapes(q.shape[:-2], centers, sums.shift.shape[:-1])


def _sums(k: Array, v: Array, side: Operand, key_mask: Array | None, threads: int | None) -> Sums:
    """What the keys leave; shift is −∞ where there is none."""
    own = [] if side.W is None else [side.W.shape[:-2]]
    own += [] if side.center is None else [side.center.shape[:-1]]
    batch = np.broadcast_shapes(k.shape[:-2], v.shape[:-2], () if key_mask is None else key_mask.shape[:-1], *own)
    return _summarize(batch, k, v, side, key_mask, threads)


class RowSums(NamedTuple):
    """What softmax attention of few queries knows of each: its largest logit, and the sum of its weights over that."""

    shift: Array  # (..., n), finite
    total: Array  # (..., n), positive


def softmax_attention(q: Array, k: Array, v: Array, /, **options: Any) -> Array:
    """The kernel `softmax_attention`, not causal."""
    return softmax_and_sums(q, k, v, **options)[0]


def softmax_and_sums(
    q: Array, k: Array, v: Array, /, *, scale: float, key_mask: Array | None = None,
    threads: int | None = None, out: Array | None = None,
) -> tuple[Array, RowSums | None]:  # fmt: skip
    """The same, and what its gradient needs."""
    n, n_kv, d_v = q.shape[-2], k.shape[-2], v.shape[-1]
    mask_batch = () if key_mask is None else key_mask.shape[:-1]
    batch = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], mask_batch)
    if out is None:
        out = np.empty((*batch, n, d_v), q.dtype)
    if n_kv <= FEW_KEYS < n:
        k, v, start = hide(k, v, key_mask)
        _read(q, Operand(k.swapaxes(-1, -2), scale), start, v, None, threads, out)
        if key_mask is not None and not (seen := key_mask.any(axis=-1)).all():
            out[np.broadcast_to(~seen, batch)] = 0  # also for a query that is NaN
        return out, None
    shift, kv, k_sum = _summarize(batch, k, v, Operand(q.swapaxes(-1, -2), scale), key_mask, threads, kv=out)
    k_sum[k_sum == 0] = 1  # the row saw nothing and is 0
    kv /= k_sum[..., None]
    return out, RowSums(np.where(shift == -math.inf, 0, shift), k_sum)


def hide(k: Array, v: Array, key_mask: Array | None) -> tuple[Array, Array, Array | None]:
    """Keys and values with zeros where hidden, 0 · NaN being NaN, and what to add to their logits."""
    if key_mask is None:
        return k, v, None
    keep = key_mask[..., None]
    return np.where(keep, k, 0), np.where(keep, v, 0), np.where(key_mask, 0, -math.inf).astype(k.dtype)


def _summarize(
    batch: tuple[int, ...], k: Array, v: Array, side: Operand, mask: Array | None, threads: int | None,
    kv: Array | None = None,
) -> Sums:  # fmt: skip
    """What the keys leave; shift is −∞ where there is none."""
    (n, d), d_v = k.shape[-2:], v.shape[-1]
    m, most = side.width(d), side.width(d) if side.is_elu else QUERIES
    v, mask = with_whole_rows(v), None if mask is None else np.ascontiguousarray(mask)
    # partial sums of chunks of keys: for one item of a long sequence, and of no weight beside the keys themselves
    chunks = max(1, min(MOST_CHUNKS, n // SUMMARY_CHUNK)) if m <= FEW_KEYS else 1
    shift, k_sum = np.empty((chunks, *batch, m), k.dtype), np.empty((chunks, *batch, m), k.dtype)
    whole = np.empty((*batch, m, d_v), k.dtype) if kv is None else kv
    part = whole[None] if chunks == 1 else np.empty((chunks, *batch, m, d_v), k.dtype)
    run(
        summarize_kernel(k.dtype, side.is_elu), SUMMARIZE_RECORD, batch, -(-m // most) * chunks, n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=-(-n // chunks), most=most, chunk_step=math.prod(batch) * m,
        **side.fields(k), v=v, v_row=row_step(v), mask=mask, shift=shift[0], kv=part[0], k_sum=k_sum[0],
    )  # fmt: skip
    if chunks == 1:
        return Sums(shift[0], whole, k_sum[0])
    largest = shift.max(axis=0)
    fade = np.exp(shift - np.where(largest == -math.inf, 0, largest))
    np.einsum("c...,c...v->...v", fade, part, out=whole)
    return Sums(largest, whole, (fade * k_sum).sum(axis=0))


def _advance(
    q: Array, k: Array, v: Array, queries: Operand, keys: Operand, mask: Array | None, sums: Sums, threads: int | None,
    out: Array, trace: Trace | None,
) -> Array:  # fmt: skip
    """Causal output of rows after a state, into `out`; the first row of each item that is not done."""
    batch, (n, d), d_v = out.shape[:-2], q.shape[-2:], v.shape[-1]
    m = keys.width(d)
    v, mask = with_whole_rows(v), None if mask is None else np.ascontiguousarray(mask)
    shift, kv, k_sum = map(np.ascontiguousarray, sums)
    undone = np.zeros(batch, np.int64)
    run(
        step_kernel(q.dtype, keys.is_elu), STEP_RECORD, batch, 1, 4 * n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=1, chunk=n,
        **keys.fields(k), v=v, v_row=row_step(v), mask=mask,
        **{f"q_{name}": value for name, value in queries.fields(q).items()},
        shift=shift, kv=kv, k_sum=k_sum, out=out, undone=undone,
        level=None if trace is None else trace.level, shifts=None if trace is None else trace.shifts,
    )  # fmt: skip
    return undone


def _read(
    q: Array, side: Operand, start: Array | None, kv: Array, k_sum: Array | None, threads: int | None, out: Array
) -> None:
    """φᵀ kv / φᵀ k_sum with exponents that begin at `start`, into `out`."""
    (n, d), d_v = q.shape[-2:], kv.shape[-1]
    m, chunks = side.width(d), max(1, -(-n // READING_CHUNK))
    kv, start, k_sum = with_whole_rows(kv), *(None if x is None else np.ascontiguousarray(x) for x in (start, k_sum))
    run(
        attend_kernel(q.dtype, side.is_elu), ATTEND_RECORD, out.shape[:-2], chunks, n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=READING_CHUNK,
        **side.fields(q), start=start, kv=kv, kv_row=row_step(kv), k_sum=k_sum, out=out,
    )  # fmt: skip
