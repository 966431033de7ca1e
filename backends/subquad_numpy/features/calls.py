"""Attention through features by verb, and softmax attention, on NumPy arrays by compiled kernels.

Each verb is `forward(arrays, static, …) -> (outputs, saved)` and `backward(arrays, static, saved, outputs, grads, need,
…)` as `subquad_numpy.compiled.Compiled` describes them. A state is (shift, numerator, denominator), axes (m, 1),
(m, d_v), (m, 1). The kernels themselves write shift and denominator as rows of m numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from subquad.kernels.feature_attention import feature_step
from subquad_numpy.features.operand import Operand, keys_of, queries_of
from subquad_numpy.runtime.arguments import row_step, run, with_whole_rows

Array = np.ndarray[Any, Any]
Arrays = Sequence[Any]  # arrays, or None where there is none
New = Callable[[tuple[int, ...], Any], Array]

SUMMARY_CHUNK, MAX_CHUNKS = 4096, 16  # keys of a task; more than this many partial sums would cost memory
READING_CHUNK = 1024  # queries of a task
GRADIENT_CHUNK = 2048  # rows of a task
SMALL_KEYS, QUERIES = 512, 256  # keys whose values stay in cache; queries that read all keys together


class Trace(NamedTuple):
    """What the gradient of `step` needs of the forward pass."""

    shift: Array  # (..., m), of the state before; −∞ where it holds no key
    numerator: Array  # (..., m, d_v)
    denominator: Array  # (..., m)
    level: Array  # (..., n), log Σ_j w[i, j], ∞ where the row sees nothing
    shifts: Array  # (..., blocks, m), the shift before each block


class RowSums(NamedTuple):
    """What softmax attention of few queries knows of each: its largest logit, and the sum of its weights over that."""

    shift: Array  # (..., n), finite
    total: Array  # (..., n), positive


# Verbs ------------------------------------------------------------------------------------------------------------


def summarize(
    arrays: Arrays, static: Mapping[str, Any], *, new: New = np.empty, save: bool = False, threads: int | None = None
) -> tuple[tuple[Array, ...], None]:
    """`feature_summarize`: the state with more keys."""
    k, v, shift, numerator, denominator, *weights, key_mask = arrays
    keys = keys_of(static["phi"], tuple(weights))
    mask_batch = () if key_mask is None else key_mask.shape[:-1]
    batch = np.broadcast_shapes(k.shape[:-2], v.shape[:-2], mask_batch, keys.batch)
    if shift is None:
        return _summarize(batch, k, v, keys, key_mask, threads, new), None
    more = _summarize(batch, k, v, keys, key_mask, threads, np.empty)
    batch = np.broadcast_shapes(batch, shift.shape[:-2])
    whole = tuple(new((*batch, *x.shape[-2:]), k.dtype) for x in more)
    np.maximum(shift, more[0], out=whole[0])
    finite = _finite(whole[0])
    fade, fade_more = np.exp(shift - finite), np.exp(more[0] - finite)
    for old, part, out in zip((numerator, denominator), more[1:], whole[1:], strict=True):
        np.multiply(old, fade, out=out)
        out += part * fade_more
    return whole, None


def summarize_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: None, outputs: Arrays, grads: Arrays, need: Sequence[bool],
    *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """Gradients of `summarize`; the new shift counts as a constant."""
    k, v, shift, numerator, denominator, *weights, key_mask = arrays
    keys = keys_of(static["phi"], tuple(weights))
    finite = _finite(outputs[0])
    by_numerator, by_denominator = (
        np.zeros_like(x) if by is None else by for by, x in zip(grads[1:], outputs[1:], strict=True)
    )
    by_W = any(need[5:7]) or len(weights) > 2
    found = _by_keys(
        k, v, keys, key_mask, finite[..., 0], by_numerator, by_denominator[..., 0], by_W=by_W, threads=threads
    )
    by: list[Array | None] = [sum_to(found.k, k.shape), sum_to(found.v, v.shape), None, None, None]
    if shift is not None:
        fade = np.exp(shift - finite)
        by[3] = sum_to(by_numerator * fade, numerator.shape)
        by[4] = sum_to(by_denominator * fade, denominator.shape)
        by[2] = _by_shift(numerator, denominator, by[3], by[4]) if need[2] else None
    if weights:
        by += [None] * len(weights)
        if found.W is not None and need[5]:
            by[5] = sum_to(found.W, (*weights[0].shape[:-2], *found.W.shape[-2:])).swapaxes(-1, -2)
    if len(weights) > 2 and found.W is not None:
        q_mean, k_mean = weights[2:]
        by[7] = sum_to(found.W.sum(axis=-2, keepdims=True) * static["phi"].scale, q_mean.shape)
        by[8] = -sum_to(found.k.sum(axis=-2, keepdims=True), k_mean.shape)
    return (*by, None)


def attend(
    arrays: Arrays, static: Mapping[str, Any], *, new: New = np.empty, save: bool = False, threads: int | None = None
) -> tuple[tuple[Array], None]:
    """`feature_attend`: what all queries read of a state."""
    q, shift, numerator, denominator, *weights = arrays
    queries = queries_of(static["phi"], tuple(weights))
    batch = np.broadcast_shapes(q.shape[:-2], _center_batch(weights), numerator.shape[:-2])
    out = new((*batch, q.shape[-2], numerator.shape[-1]), q.dtype)
    _read(q, queries, _finite(shift)[..., 0], numerator, denominator[..., 0], threads, out)
    return (out,), None


def attend_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: None, outputs: Arrays, grads: Arrays, need: Sequence[bool],
    *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """Gradients of `attend`."""
    q, shift, numerator, denominator, *weights = arrays
    queries = queries_of(static["phi"], tuple(weights))
    found = _by_queries(
        q, queries, _finite(shift)[..., 0], numerator, denominator[..., 0], outputs[0], grads[0],
        by_W=len(weights) > 1 and need[5], threads=threads,
    )  # fmt: skip
    by_numerator = sum_to(found.kv, numerator.shape)
    by_denominator = sum_to(found.k_sum[..., None], denominator.shape)
    by: list[Array | None] = [sum_to(found.q, q.shape), None, by_numerator, by_denominator, *[None] * len(weights)]
    if need[1]:
        by[1] = _by_shift(numerator, denominator, by_numerator, by_denominator)
    if found.W is not None:
        by[5] = sum_to(found.W, found.W.shape[-2:]).T
    if len(weights) > 2:
        by[6] = -sum_to(found.q.sum(axis=-2, keepdims=True), weights[2].shape)
    return tuple(by)


def step(
    arrays: Arrays, static: Mapping[str, Any], *, new: New = np.empty, save: bool = False, threads: int | None = None
) -> tuple[tuple[Array, ...], Trace | None]:
    """`feature_step`: causal output of rows after a state, and the state after them.

    What exceeds the range of the compiled kernel is left to the generic form: rows that it hands back, and the state
    of an item with a key or value that is not finite. Of a call with such an item nothing is saved.
    """
    q, k, v, shift, numerator, denominator, *weights, key_mask = arrays
    phi = static["phi"]
    keys, queries = keys_of(phi, tuple(weights)), queries_of(phi, tuple(weights))
    (n, d), d_v = q.shape[-2:], v.shape[-1]
    m = keys.width(d)
    mask_batch, state_batch = (() if x is None else x for x in (
        key_mask if key_mask is None else key_mask.shape[:-1], shift if shift is None else shift.shape[:-2]
    ))  # fmt: skip
    center = _center_batch(weights)
    kept = np.broadcast_shapes(k.shape[:-2], v.shape[:-2], mask_batch, state_batch, keys.batch, center)
    batch = np.broadcast_shapes(q.shape[:-2], kept)
    if shift is None:
        before = (
            np.full((*kept, m), -math.inf, q.dtype),
            np.zeros((*kept, m, d_v), q.dtype),
            np.zeros((*kept, m), q.dtype),
        )
    else:
        before = shift[..., 0], numerator, denominator[..., 0]
    before = tuple(
        np.broadcast_to(x, (*batch, *x.shape[x.ndim - axes :])) for x, axes in zip(before, (1, 2, 1), strict=True)
    )
    out = new((*batch, n, d_v), q.dtype)
    # one item of those that share their keys would do: where heads of queries share them, all write, and one is taken
    make = new if kept == batch else np.empty
    after = tuple(make((*batch, *tail), q.dtype) for tail in ((m, 1), (m, d_v), (m, 1)))
    trace = None
    if save:
        from subquad_numpy.features.step import block_rows

        shifts = np.empty((*batch, -(-n // block_rows(q.dtype)), m), q.dtype)
        trace = Trace(*before, np.full((*batch, n), math.nan, q.dtype), shifts)
    undone = _advance(q, k, v, queries, keys, key_mask, before, threads, out, after, trace)
    shared = tuple(slice(0, 1) if size == 1 != whole else slice(None) for size, whole in
                   zip((1,) * (len(batch) - len(kept)) + kept, batch, strict=True))  # fmt: skip
    own_undone = undone
    if kept != batch:
        places = []
        for x in after:
            place = new((*kept, *x.shape[-2:]), q.dtype)
            place[...] = x[shared].reshape(place.shape)
            places.append(place)
        after = tuple(places)
        own_undone = undone[shared].reshape(kept)
    if (undone != n).any():
        whole, *state = feature_step.generic(
            q, k, v, shift, numerator, denominator, *weights, phi=phi, key_mask=key_mask
        )
        mine = np.arange(n)[:, None] < undone[..., None, None]
        out[...] = np.where(mine, out, whole)
        for x, other in zip(after, state, strict=True):
            x[...] = np.where(own_undone[..., None, None] == n, x, other)
    return (out, *after), None if trace is None or np.isnan(trace.level).any() else trace


def step_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: Trace | None, outputs: Arrays, grads: Arrays,
    need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...] | None:  # fmt: skip
    """Gradients of `step`; None by weights, with centers, of the state after, and where nothing was saved."""
    q, k, v, shift, numerator, denominator, *weights, key_mask = arrays
    grad, *by_after = grads
    if saved is None or grad is None or len(weights) > 2 or any(need[6:8]) or any(x is not None for x in by_after):
        return None
    from subquad_numpy.features.step_gradient import STEP_GRADIENT_RECORD, step_gradient_kernel

    phi = static["phi"]
    keys, queries = keys_of(phi, tuple(weights)), queries_of(phi, tuple(weights))
    batch, (n, d), d_v = grad.shape[:-2], q.shape[-2:], v.shape[-1]
    m = keys.width(d)
    mask = None if key_mask is None else np.ascontiguousarray(key_mask)
    v_rows, out, grad = map(with_whole_rows, (v, outputs[0], grad))
    kv, k_sum = map(np.ascontiguousarray, (saved.numerator, saved.denominator))
    by_q, by_k, by_v = (np.empty((*batch, n, width), q.dtype) for width in (d, d, d_v))
    by_kv, by_sum = np.empty((*batch, m, d_v), q.dtype), np.empty((*batch, m), q.dtype)
    run(
        step_gradient_kernel(q.dtype, keys.is_elu), STEP_GRADIENT_RECORD, batch, 1, 9 * n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=1, chunk=n,
        **keys.fields(k), v=v_rows, v_row=row_step(v_rows), mask=mask,
        **{f"q_{name}": value for name, value in queries.fields(q).items()},
        kv=kv, k_sum=k_sum, level=saved.level, shifts=saved.shifts,
        out=out, out_row=row_step(out), grad=grad, grad_row=row_step(grad),
        grad_q=by_q, grad_k=by_k, grad_v=by_v, grad_kv=by_kv, grad_sum=by_sum,
    )  # fmt: skip
    by: list[Array | None] = [sum_to(x, y.shape) for x, y in zip((by_q, by_k, by_v), (q, k, v), strict=True)]
    if shift is None:
        by += [None, None, None]
    else:
        by_numerator, by_denominator = sum_to(by_kv, numerator.shape), sum_to(by_sum[..., None], denominator.shape)
        by_shift = _by_shift(numerator, denominator, by_numerator, by_denominator) if need[3] else None
        by += [by_shift, by_numerator, by_denominator]
    return (*by, *[None] * len(weights), None)


def softmax(
    arrays: Arrays, static: Mapping[str, Any], *, new: New = np.empty, save: bool = False, threads: int | None = None
) -> tuple[tuple[Array], RowSums | None]:
    """`softmax_attention`, where every query sees all keys that the mask shows."""
    q, k, v, key_mask = arrays
    scale = static["scale"]
    n, n_kv, d_v = q.shape[-2], k.shape[-2], v.shape[-1]
    mask_batch = () if key_mask is None else key_mask.shape[:-1]
    batch = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], mask_batch)
    out = new((*batch, n, d_v), q.dtype)
    if n_kv <= SMALL_KEYS < n:
        k, v, start = _hide(k, v, key_mask)
        _read(q, Operand(k.swapaxes(-1, -2), scale), start, v, None, threads, out)
        if key_mask is not None and not (seen := key_mask.any(axis=-1)).all():
            out[np.broadcast_to(~seen, batch)] = 0  # also for a query that is NaN
        return (out,), None
    queries = Operand(q.swapaxes(-1, -2), scale)
    shift, kv, k_sum = _summarize(batch, k, v, queries, key_mask, threads, np.empty, kv=out)
    k_sum[k_sum == 0] = 1  # the row saw nothing and is 0
    kv /= k_sum
    return (out,), RowSums(_finite(shift)[..., 0], k_sum[..., 0])


def softmax_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: RowSums | None, outputs: Arrays, grads: Arrays,
    need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """Gradients of `softmax`."""
    q, k, v, key_mask = arrays
    (out,), (grad,), scale = outputs, grads, static["scale"]
    if saved is None:  # few keys are the directions of the queries
        keys, values, start = _hide(k, v, key_mask)
        operand = Operand(keys.swapaxes(-1, -2), scale)
        found = _by_queries(q, operand, start, values, None, out, grad, by_W=True, threads=threads)
        assert found.W is not None
        by_q, by_k, by_v = found.q, scale * found.W, found.kv
        if key_mask is not None:
            if not (seen := key_mask.any(axis=-1)).all():
                by_q[np.broadcast_to(~seen, grad.shape[:-2])] = 0
            keep = key_mask[..., None]  # 0 · NaN is NaN: that of a query must not reach a hidden key
            by_k, by_v = np.where(keep, by_k, 0), np.where(keep, by_v, 0)
    else:
        by_kv = grad / saved.total[..., None]
        operand, by_sum = Operand(q.swapaxes(-1, -2), scale), -(by_kv * out).sum(axis=-1)
        of_keys = _by_keys(k, v, operand, key_mask, saved.shift, by_kv, by_sum, by_W=True, threads=threads)
        assert of_keys.W is not None
        by_q, by_k, by_v = scale * of_keys.W, of_keys.k, of_keys.v
    return sum_to(by_q, q.shape), sum_to(by_k, k.shape), sum_to(by_v, v.shape), None


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes that broadcasting from `shape` added."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape)))) if x.ndim > len(shape) else x
    once = tuple(axis for axis, size in enumerate(shape) if size == 1 != x.shape[axis])
    return x.sum(axis=once, keepdims=True) if once else x


# Runs of one kernel -------------------------------------------------------------------------------------------------


class ByQueries(NamedTuple):
    """What the queries give: gradients by q and by the sums over keys, and by the directions (m, d) if asked for."""

    q: Array
    kv: Array
    k_sum: Array
    W: Array | None


class ByKeys(NamedTuple):
    """What the keys give: gradients by k, by v, and by the directions (m, d) if asked for."""

    k: Array
    v: Array
    W: Array | None


def _summarize(
    batch: tuple[int, ...], k: Array, v: Array, side: Operand, mask: Array | None, threads: int | None, new: New,
    kv: Array | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """What the keys leave, (…, m, 1), (…, m, d_v), (…, m, 1); shift is −∞ where there is no key."""
    from subquad_numpy.features.summarize import SUMMARIZE_RECORD, summarize_kernel

    (n, d), d_v = k.shape[-2:], v.shape[-1]
    m, most = side.width(d), side.width(d) if side.is_elu else QUERIES
    v, mask = with_whole_rows(v), None if mask is None else np.ascontiguousarray(mask)
    # partial sums of chunks of keys: for one item of a long sequence, and of no weight beside the keys themselves
    chunks = max(1, min(MAX_CHUNKS, n // SUMMARY_CHUNK)) if m <= SMALL_KEYS else 1
    whole_kv = new((*batch, m, d_v), k.dtype) if kv is None else kv
    whole = new((*batch, m, 1), k.dtype), whole_kv, new((*batch, m, 1), k.dtype)
    if chunks == 1:
        shift, part, k_sum = (x[None] for x in whole)
    else:
        shift, k_sum = np.empty((chunks, *batch, m, 1), k.dtype), np.empty((chunks, *batch, m, 1), k.dtype)
        part = np.empty((chunks, *batch, m, d_v), k.dtype)
    run(
        summarize_kernel(k.dtype, side.is_elu), SUMMARIZE_RECORD, batch, -(-m // most) * chunks, n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=-(-n // chunks), most=most, chunk_step=math.prod(batch) * m,
        **side.fields(k), v=v, v_row=row_step(v), mask=mask,
        shift=shift[0, ..., 0], kv=part[0], k_sum=k_sum[0, ..., 0],
    )  # fmt: skip
    if chunks > 1:
        np.max(shift, axis=0, out=whole[0])
        fade = np.exp(shift - _finite(whole[0]))
        np.einsum("c...,c...v->...v", fade[..., 0], part, out=whole[1])
        np.sum(fade * k_sum, axis=0, out=whole[2])
    return whole


def _advance(
    q: Array, k: Array, v: Array, queries: Operand, keys: Operand, mask: Array | None, before: Arrays,
    threads: int | None, out: Array, after: Arrays, trace: Trace | None,
) -> Array:  # fmt: skip
    """Write causal output of rows after a state, and the state after them; what each item has not done."""
    from subquad_numpy.features.step import STEP_RECORD, step_kernel

    batch, (n, d), d_v = out.shape[:-2], q.shape[-2:], v.shape[-1]
    m = keys.width(d)
    v, mask = with_whole_rows(v), None if mask is None else np.ascontiguousarray(mask)
    shift, kv, k_sum = map(np.ascontiguousarray, before)
    undone = np.full(batch, n, np.int64)
    run(
        step_kernel(q.dtype, keys.is_elu), STEP_RECORD, batch, 1, 4 * n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=1, chunk=n,
        **keys.fields(k), v=v, v_row=row_step(v), mask=mask,
        **{f"q_{name}": value for name, value in queries.fields(q).items()},
        shift=shift, kv=kv, k_sum=k_sum, out=out, undone=undone,
        level=None if trace is None else trace.level, shifts=None if trace is None else trace.shifts,
        new_shift=after[0][..., 0], new_kv=after[1], new_k_sum=after[2][..., 0],
    )  # fmt: skip
    return undone


def _read(
    q: Array, side: Operand, start: Array | None, kv: Array, k_sum: Array | None, threads: int | None, out: Array
) -> None:
    """Write φᵀ kv / φᵀ k_sum into `out`, with exponents that begin at `start`."""
    from subquad_numpy.features.attend import ATTEND_RECORD, attend_kernel

    (n, d), d_v = q.shape[-2:], kv.shape[-1]
    m, chunks = side.width(d), max(1, -(-n // READING_CHUNK))
    kv, start, k_sum = with_whole_rows(kv), *(None if x is None else np.ascontiguousarray(x) for x in (start, k_sum))
    run(
        attend_kernel(q.dtype, side.is_elu), ATTEND_RECORD, out.shape[:-2], chunks, n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=READING_CHUNK,
        **side.fields(q), start=start, kv=kv, kv_row=row_step(kv), k_sum=k_sum, out=out,
    )  # fmt: skip


def _by_queries(
    q: Array, side: Operand, start: Array | None, kv: Array, k_sum: Array | None, out: Array, grad: Array, *,
    by_W: bool, threads: int | None,
) -> ByQueries:  # fmt: skip
    """The gradient of `_read`."""
    from subquad_numpy.features.attend_gradient import ATTEND_GRADIENT_RECORD, attend_gradient_kernel

    batch, (n, d), d_v = grad.shape[:-2], q.shape[-2:], kv.shape[-1]
    m, (chunks, chunk) = side.width(d), _chunks(n)
    kv, out, grad = map(with_whole_rows, (kv, out, grad))
    start, k_sum = (None if x is None else np.ascontiguousarray(x) for x in (start, k_sum))
    grad_q = np.empty((*batch, n, d), q.dtype)
    shapes = ((d_v,), (), (d,)) if by_W else ((d_v,), ())
    grads = [np.empty((chunks, *batch, m, *shape), q.dtype) for shape in shapes]
    run(
        attend_gradient_kernel(q.dtype, side.is_elu), ATTEND_GRADIENT_RECORD, batch, chunks, 3 * n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=chunk, chunk_step=math.prod(batch) * m,
        **side.fields(q), start=start, kv=kv, kv_row=row_step(kv), k_sum=k_sum,
        out=out, out_row=row_step(out), grad=grad, grad_row=row_step(grad),
        grad_q=grad_q, grad_kv=grads[0][0], grad_sum=grads[1][0], grad_W=grads[2][0] if by_W else None,
    )  # fmt: skip
    sums = [x[0] if chunks == 1 else x.sum(axis=0) for x in grads]
    return ByQueries(grad_q, sums[0], sums[1], sums[2] if by_W else None)


def _by_keys(
    k: Array, v: Array, side: Operand, mask: Array | None, shift: Array, grad_kv: Array, grad_sum: Array, *,
    by_W: bool, threads: int | None,
) -> ByKeys:  # fmt: skip
    """The gradient of `_summarize`; the shift is finite, and has the batch shape of the call."""
    from subquad_numpy.features.summarize_gradient import SUMMARIZE_GRADIENT_RECORD, summarize_gradient_kernel

    batch, (n, d), d_v = shift.shape[:-1], k.shape[-2:], v.shape[-1]
    m, (chunks, chunk) = side.width(d), _chunks(n)
    v, mask = with_whole_rows(v), None if mask is None else np.ascontiguousarray(mask)
    shift, grad_kv, grad_sum = map(np.ascontiguousarray, (shift, grad_kv, grad_sum))
    new = np.empty if mask is None else np.zeros
    grad_k, grad_v = new((*batch, n, d), k.dtype), new((*batch, n, d_v), k.dtype)
    grad_W = np.empty((chunks, *batch, m, d), k.dtype) if by_W else None
    run(
        summarize_gradient_kernel(k.dtype, side.is_elu), SUMMARIZE_GRADIENT_RECORD, batch, chunks, 3 * n * d * m,
        threads, n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=chunk, chunk_step=math.prod(batch) * m,
        **side.fields(k), v=v, v_row=row_step(v), mask=mask, shift=shift, grad_kv=grad_kv, grad_sum=grad_sum,
        grad_k=grad_k, grad_v=grad_v, grad_W=None if grad_W is None else grad_W[0],
    )  # fmt: skip
    return ByKeys(grad_k, grad_v, None if grad_W is None else grad_W.sum(axis=0))


def _chunks(n: int) -> tuple[int, int]:
    """How many chunks a gradient has, and the rows of each."""
    chunks = max(1, min(MAX_CHUNKS, n // GRADIENT_CHUNK))
    return chunks, -(-n // chunks)


def _finite(shift: Array) -> Array:
    """The shift with 0 in place of −∞; NaN stays."""
    return np.where(shift == -math.inf, 0, shift)


def _by_shift(numerator: Array, denominator: Array, by_numerator: Array, by_denominator: Array) -> Array:
    """The gradient by the shift of a state that is read, as sums over exp(shift) have it."""
    return (numerator * by_numerator).sum(axis=-1, keepdims=True) + denominator * by_denominator


def _center_batch(weights: Sequence[Array]) -> tuple[int, ...]:
    """The batch shape of both centers; () where there are none."""
    return np.broadcast_shapes(*(x.shape[:-2] for x in weights[2:]))


def _hide(k: Array, v: Array, key_mask: Array | None) -> tuple[Array, Array, Array | None]:
    """Keys and values with zeros where hidden, 0 · NaN being NaN, and what to add to their logits."""
    if key_mask is None:
        return k, v, None
    keep = key_mask[..., None]
    return np.where(keep, k, 0), np.where(keep, v, 0), np.where(key_mask, 0, -math.inf).astype(k.dtype)
