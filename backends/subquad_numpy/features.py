"""Attention through exponential features, and softmax attention, on NumPy arrays by compiled kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from subquad.kernels._feature_map import Exponential
from subquad_numpy._causal_features import CAUSAL_FRAME, causal_kernel
from subquad_numpy._features import READING_FRAME, SUMMARY_FRAME, reading_kernel, summary_kernel
from subquad_numpy._frame import in_elements, offsets, row_step, run, with_whole_rows

Array = np.ndarray[Any, Any]

SUMMARY_CHUNK, MOST_CHUNKS = 4096, 16  # keys of a task; more than this many partial sums would cost memory
READING_CHUNK = 1024  # queries of a task
FEW_KEYS, QUERIES = 512, 256  # keys whose values stay in cache; queries that read all keys together


class Sums(NamedTuple):
    """What attention through features knows of the keys: Σ_j φ(k[j]) v[j]ᵀ and Σ_j φ(k[j]), over exp(shift)."""

    shift: Array  # (..., m)
    kv: Array  # (..., m, d_v)
    k_sum: Array  # (..., m)


def feature_product(q: Array, k: Array, v: Array, /, *, causal: bool = False, **options: Any) -> Array:
    """The kernel `feature_product` for features that are exponentials."""
    return causal_product(q, k, v, **options) if causal else product_and_sums(q, k, v, **options)[0]


def product_and_sums(
    q: Array, k: Array, v: Array, /, *, exponential: Exponential, key_mask: Array | None = None,
    threads: int | None = None, out: Array | None = None,
) -> tuple[Array, Sums]:  # fmt: skip
    """The same, and what its gradient needs."""
    W, q_mean, k_mean, batch, batch_kv = _sides(q, k, v, exponential, key_mask)
    sums = _sums(batch_kv, k, v, W, key_mask, exponential.scale, threads, k_mean)
    start = np.where(sums.shift == -math.inf, 0, sums.shift)
    if out is None:
        out = np.empty((*batch, q.shape[-2], v.shape[-1]), q.dtype)
    _read(batch, q, exponential.queries, start, sums.kv, sums.k_sum, 1.0, threads, out, center=q_mean)
    return out, Sums(start, sums.kv, sums.k_sum)


def causal_product(
    q: Array, k: Array, v: Array, /, *, exponential: Exponential, key_mask: Array | None = None,
    threads: int | None = None, out: Array | None = None,
) -> Array:  # fmt: skip
    """The kernel `feature_product` for features that are exponentials, causal."""
    n, n_kv, d_v = q.shape[-2], k.shape[-2], v.shape[-1]
    W, q_mean, k_mean, batch, batch_kv = _sides(q, k, v, exponential, key_mask)
    if out is None:
        out = np.empty((*batch, n, d_v), q.dtype)
    ahead, early = max(n_kv - n, 0), max(n - n_kv, 0)
    out[..., :early, :] = 0  # rows before the first key
    if n == early:
        return out
    before, after = (None if key_mask is None else key_mask[..., x] for x in (slice(ahead), slice(ahead, None)))
    # keys that every row sees
    sums = _sums(batch_kv, k[..., :ahead, :], v[..., :ahead, :], W, before, exponential.scale, threads, k_mean)
    sums = Sums(*(np.broadcast_to(x, (*batch, *x.shape[len(batch_kv) :])) for x in sums))
    q, k, v = q[..., early:, :], k[..., ahead:, :], v[..., ahead:, :]
    rows = out if early == 0 else np.empty((*batch, n - early, d_v), q.dtype)
    _advance(
        batch, q, k, v, exponential.queries, W, after, abs(exponential.scale) / 2, q_mean, k_mean, sums, threads, rows
    )
    if early:
        out[..., early:, :] = rows
    return out


def _sides(
    q: Array, k: Array, v: Array, exponential: Exponential, key_mask: Array | None
) -> tuple[Array, Array | None, Array | None, tuple[int, ...], tuple[int, ...]]:
    """W of the keys, the centers as rows, the batch shape, and that of all but the queries."""
    W = exponential.keys
    q_mean, k_mean = exponential.center or (None, None)
    batches = [k.shape[:-2], v.shape[:-2], () if key_mask is None else key_mask.shape[:-1]]
    if q_mean is not None and k_mean is not None:
        W = W + (exponential.scale * q_mean).swapaxes(-1, -2)
        batches += [q_mean.shape[:-2], k_mean.shape[:-2]]
        q_mean, k_mean = q_mean[..., 0, :], k_mean[..., 0, :]
    batch_kv = np.broadcast_shapes(*batches)
    return W, q_mean, k_mean, np.broadcast_shapes(q.shape[:-2], batch_kv), batch_kv


def _sums(
    batch: tuple[int, ...], k: Array, v: Array, W: Array, key_mask: Array | None, scale: float, threads: int | None,
    center: Array | None,
) -> Sums:  # fmt: skip
    """What the keys leave; shift is −∞ where there is none."""
    found = _summarize(batch, k, v, W, key_mask, abs(scale) / 2, 1.0, threads, center=center)
    return Sums(*(x.reshape(*batch, W.shape[-1], *x.shape[1:]) for x in found))


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
        _read(batch, q, k.swapaxes(-1, -2), start, v, None, scale, threads, out)
        if key_mask is not None and not (seen := key_mask.any(axis=-1)).all():
            out[np.broadcast_to(~seen, batch)] = 0  # also for a query that is NaN
        return out, None
    shift, kv, k_sum = _summarize(batch, k, v, q.swapaxes(-1, -2), key_mask, 0.0, scale, threads, kv=out)
    k_sum[k_sum == 0] = 1  # the row saw nothing and is 0
    kv /= k_sum[..., None]
    return out, RowSums(np.where(shift == -math.inf, 0, shift).reshape(*batch, n), k_sum.reshape(*batch, n))


def hide(k: Array, v: Array, key_mask: Array | None) -> tuple[Array, Array, Array | None]:
    """Keys and values with zeros where hidden, 0 · NaN being NaN, and what to add to their logits."""
    if key_mask is None:
        return k, v, None
    keep = key_mask[..., None]
    return np.where(keep, k, 0), np.where(keep, v, 0), np.where(key_mask, 0, -math.inf).astype(k.dtype)


def _summarize(
    batch: tuple[int, ...],
    k: Array,
    v: Array,
    W: Array,
    mask: Array | None,
    half_scale: float,
    factor: float,
    threads: int | None,
    kv: Array | None = None,
    center: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(shift, Σ exp(x − shift) v, Σ exp(x − shift)) of x = factor k W − h |k|²; m features of each item in a row."""
    (n, d), m, d_v = k.shape[-2:], W.shape[-1], v.shape[-1]
    k, v, W = with_whole_rows(k), with_whole_rows(v), in_elements(W)
    mask, center = (None if x is None else np.ascontiguousarray(x) for x in (mask, center))
    items, blocks = math.prod(batch), -(-m // QUERIES)
    # partial sums of chunks of keys: for one item of a long sequence, and of no weight beside the keys themselves
    chunks = max(1, min(MOST_CHUNKS, n // SUMMARY_CHUNK)) if m <= FEW_KEYS else 1
    rows = items * m
    shift, k_sum = np.empty((chunks, rows), k.dtype), np.empty((chunks, rows), k.dtype)
    whole = np.empty((rows, d_v), k.dtype) if kv is None else kv
    part = whole if chunks == 1 else np.empty((chunks, rows, d_v), k.dtype)
    table = np.zeros((items, blocks, 7), np.int64)
    first = np.arange(blocks) * QUERIES
    for place, x, core in ((0, k, 2), (1, v, 2), (2, W, 2), (3, mask, 1), (6, center, 1)):
        if x is not None:
            table[..., place] = offsets(x, batch, core)[:, None]
    W_row, W_step = (stride // W.itemsize for stride in W.strides[-2:])
    table[..., 2] += first * W_step
    table[..., 4] = np.arange(items)[:, None] * m + first
    table[..., 5] = np.minimum(m - first, QUERIES)
    run(
        summary_kernel(k.dtype), SUMMARY_FRAME, items * blocks * chunks, items * n * d * m, threads,
        n=n, d=d, m=min(m, QUERIES), d_v=d_v, chunks=chunks, chunk=-(-n // chunks), out_rows=rows,
        k_row=row_step(k), v_row=row_step(v), W_row=W_row, W_step=W_step,
        k=k, v=v, W=W, mask=mask, numbers=np.array([half_scale, factor], k.dtype), table=table,
        shift=shift, kv=part, k_sum=k_sum, center=center,
    )  # fmt: skip
    if chunks == 1:
        return shift[0], whole.reshape(rows, d_v), k_sum[0]
    largest = shift.max(axis=0)
    fade = np.exp(shift - np.where(largest == -math.inf, 0, largest))
    np.einsum("cr,crv->rv", fade, part, out=whole.reshape(rows, d_v))
    return largest, whole.reshape(rows, d_v), (fade * k_sum).sum(axis=0)


def _advance(
    batch: tuple[int, ...], q: Array, k: Array, v: Array, U: Array, W: Array, mask: Array | None, half_scale: float,
    q_center: Array | None, k_center: Array | None, sums: Sums, threads: int | None, out: Array,
) -> None:  # fmt: skip
    """Causal output of rows after a state, into `out`."""
    (n, d), m, d_v = q.shape[-2:], W.shape[-1], v.shape[-1]
    q, k, v, U, W = *map(with_whole_rows, (q, k, v)), in_elements(U), in_elements(W)
    mask, q_center, k_center = (None if x is None else np.ascontiguousarray(x) for x in (mask, q_center, k_center))
    items = math.prod(batch)
    table = np.zeros((items, 8), np.int64)
    parts = ((q, 2), (k, 2), (v, 2), (U, 2), (W, 2), (mask, 1), (q_center, 1), (k_center, 1))
    for place, (x, core) in enumerate(parts):
        if x is not None:
            table[:, place] = offsets(x, batch, core)
    U_row, U_step, W_row, W_step = (stride // W.itemsize for x in (U, W) for stride in x.strides[-2:])
    shift, kv, k_sum = map(np.ascontiguousarray, sums)
    run(
        causal_kernel(q.dtype), CAUSAL_FRAME, items, 4 * items * n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, q_row=row_step(q), k_row=row_step(k), v_row=row_step(v),
        U_row=U_row, U_step=U_step, W_row=W_row, W_step=W_step,
        q=q, k=k, v=v, U=U, W=W, mask=mask, q_center=q_center, k_center=k_center,
        numbers=np.array([half_scale], q.dtype), table=table, shift=shift, kv=kv, k_sum=k_sum, out=out,
    )  # fmt: skip


def _read(
    batch: tuple[int, ...],
    q: Array,
    W: Array,
    start: Array | None,
    kv: Array,
    k_sum: Array | None,
    factor: float,
    threads: int | None,
    out: Array,
    center: Array | None = None,
) -> Array:
    """exp(y)ᵀ kv / exp(y)ᵀ k_sum of y = factor q W + start, into `out`."""
    (n, d), m, d_v = q.shape[-2:], W.shape[-1], kv.shape[-1]
    q, W, kv = with_whole_rows(q), in_elements(W), with_whole_rows(kv)
    start, k_sum, center = (None if x is None else np.ascontiguousarray(x) for x in (start, k_sum, center))
    items, chunks = math.prod(batch), max(1, -(-n // READING_CHUNK))
    table = np.zeros((items, 7), np.int64)
    parts = ((q, 2), (W, 2), (start, 1), (kv, 2), (k_sum, 1), (out, 2), (center, 1))
    for place, (x, core) in enumerate(parts):
        if x is not None:
            table[:, place] = offsets(x, batch, core)
    W_row, W_step = (stride // W.itemsize for stride in W.strides[-2:])
    run(
        reading_kernel(q.dtype), READING_FRAME, items * chunks, items * n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=READING_CHUNK,
        q_row=row_step(q), W_row=W_row, W_step=W_step, kv_row=row_step(kv),
        q=q, W=W, start=start, kv=kv, k_sum=k_sum, numbers=np.array([factor], q.dtype), table=table,
        out=out, center=center,
    )  # fmt: skip
    return out
