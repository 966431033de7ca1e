"""The gradient of attention through exponential features, and of softmax attention with few keys or few queries."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from subquad.kernels._feature_map import Elu, Exponential
from subquad_numpy.features.attend_gradient import ATTEND_GRADIENT_RECORD, attend_gradient_kernel
from subquad_numpy.features.calls import RowSums, Sums, Trace, hide
from subquad_numpy.features.operand import Operand, operands_of
from subquad_numpy.features.step_gradient import STEP_GRADIENT_RECORD, step_gradient_kernel
from subquad_numpy.features.summarize_gradient import SUMMARIZE_GRADIENT_RECORD, summarize_gradient_kernel
from subquad_numpy.runtime.arguments import row_step, run, with_whole_rows

Array = np.ndarray[Any, Any]

CHUNK, MOST_CHUNKS = 2048, 16  # rows of a task; more than this many partial sums would cost memory


class ByQueries(NamedTuple):
    """What the queries give: gradients by q and by the sums over keys, and by the directions (m, d) if asked for."""

    q: Array
    kv: Array
    k_sum: Array
    W: Array | None


class ByKeys(NamedTuple):
    """What the keys give."""

    k: Array
    v: Array
    W: Array | None


def feature_product_gradient(
    q: Array, k: Array, v: Array, sums: Sums, out: Array, grad: Array, /, *, phi: Exponential | Elu,
    key_mask: Array | None = None, directions: bool = False, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """Gradients by q, k, v, then by `keys`, `queries` and the two centers of the features where these are asked for.

    `sums` are what `product_and_sums` found. Those by q, k and v have the batch axes of the whole call.
    """
    keys, queries = operands_of(phi)
    by_W = directions or keys.center is not None
    by_q = _by_queries(q, queries, sums.shift, sums.kv, sums.k_sum, out, grad, by_W=directions, threads=threads)
    by_kv, by_sum = sum_to(by_q.kv, sums.kv.shape), sum_to(by_q.k_sum, sums.k_sum.shape)
    by_k = _by_keys(k, v, keys, key_mask, sums.shift, by_kv, by_sum, by_W=by_W, threads=threads)
    found: list[Array | None] = [by_q.q, by_k.k, by_k.v, None, None, None, None]
    if directions and by_k.W is not None and by_q.W is not None:
        found[3], found[4] = (sum_to(x, x.shape[-2:]).T for x in (by_k.W, by_q.W))
    if isinstance(phi, Exponential) and phi.center is not None and by_k.W is not None:
        q_mean, k_mean = phi.center
        mine = sum_to(by_k.W.sum(axis=-2, keepdims=True) * phi.scale, q_mean.shape)
        found[5] = mine - sum_to(by_q.q.sum(axis=-2, keepdims=True), q_mean.shape)
        found[6] = -sum_to(by_k.k.sum(axis=-2, keepdims=True), k_mean.shape)
    return tuple(found)


def causal_product_gradient(
    q: Array, k: Array, v: Array, trace: Trace, out: Array, grad: Array, /, *, phi: Exponential | Elu,
    key_mask: Array | None = None, threads: int | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients by q, k and v of the same, causal and without centers; `trace` is what `causal_and_trace` found."""
    keys, queries = operands_of(phi)
    batch, (n, d), d_v = grad.shape[:-2], q.shape[-2:], v.shape[-1]
    n_kv, m = k.shape[-2], keys.width(d)
    ahead, early = max(n_kv - n, 0), max(n - n_kv, 0)
    before, after = (None if key_mask is None else key_mask[..., x] for x in (slice(ahead), slice(ahead, None)))
    after = None if after is None else np.ascontiguousarray(after)
    late_v, late_out, late_grad = map(with_whole_rows, (v[..., ahead:, :], out[..., early:, :], grad[..., early:, :]))
    shift, kv, k_sum = map(np.ascontiguousarray, trace.before)
    by_q, by_k, by_v = (np.empty((*batch, n - early, width), q.dtype) for width in (d, d, d_v))
    by_kv, by_sum = np.empty((*batch, m, d_v), q.dtype), np.empty((*batch, m), q.dtype)
    run(
        step_gradient_kernel(q.dtype, keys.is_elu), STEP_GRADIENT_RECORD, batch, 1, 9 * n * d * m, threads,
        n=n - early, d=d, m=m, d_v=d_v, chunks=1, chunk=n - early,
        **keys.fields(k[..., ahead:, :]), v=late_v, v_row=row_step(late_v), mask=after,
        **{f"q_{name}": value for name, value in queries.fields(q[..., early:, :]).items()},
        kv=kv, k_sum=k_sum, level=trace.level, shifts=trace.shifts,
        out=late_out, out_row=row_step(late_out), grad=late_grad, grad_row=row_step(late_grad),
        grad_q=by_q, grad_k=by_k, grad_v=by_v, grad_kv=by_kv, grad_sum=by_sum,
    )  # fmt: skip
    if early:
        by_q = np.concatenate([np.zeros((*batch, early, d), q.dtype), by_q], axis=-2)
    if ahead:
        start = np.where(shift == -math.inf, 0, shift)
        first = _by_keys(
            k[..., :ahead, :], v[..., :ahead, :], keys, before, start, by_kv, by_sum, by_W=False, threads=threads
        )
        by_k, by_v = np.concatenate([first.k, by_k], axis=-2), np.concatenate([first.v, by_v], axis=-2)
    return by_q, by_k, by_v


def softmax_attention_gradient(
    q: Array, k: Array, v: Array, sums: RowSums | None, out: Array, grad: Array, /, *, scale: float,
    key_mask: Array | None = None, threads: int | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients by q, k and v, with the batch axes of the whole call; `sums` are what `softmax_and_sums` found."""
    if sums is None:  # few keys are the directions of the queries
        k, v, start = hide(k, v, key_mask)
        by = _by_queries(q, Operand(k.swapaxes(-1, -2), scale), start, v, None, out, grad, by_W=True, threads=threads)
        assert by.W is not None
        if key_mask is None:
            return by.q, scale * by.W, by.kv
        if not (seen := key_mask.any(axis=-1)).all():
            by.q[np.broadcast_to(~seen, grad.shape[:-2])] = 0
        keep = key_mask[..., None]  # 0 · NaN is NaN: that of a query must not reach a hidden key
        return by.q, np.where(keep, scale * by.W, 0), np.where(keep, by.kv, 0)
    by_kv = grad / sums.total[..., None]
    found = _by_keys(
        k, v, Operand(q.swapaxes(-1, -2), scale), key_mask, sums.shift, by_kv, -(by_kv * out).sum(axis=-1),
        by_W=True, threads=threads,
    )  # fmt: skip
    assert found.W is not None
    return scale * found.W, found.k, found.v


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes that broadcasting from `shape` added."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape)))) if x.ndim > len(shape) else x
    once = tuple(axis for axis, size in enumerate(shape) if size == 1 != x.shape[axis])
    return x.sum(axis=once, keepdims=True) if once else x


def _by_queries(
    q: Array, side: Operand, start: Array | None, kv: Array, k_sum: Array | None, out: Array, grad: Array, *, by_W: bool,
    threads: int | None,
) -> ByQueries:  # fmt: skip
    """The gradient of `features._read`."""
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
    k: Array, v: Array, side: Operand, mask: Array | None, shift: Array, grad_kv: Array, grad_sum: Array, *, by_W: bool,
    threads: int | None,
) -> ByKeys:  # fmt: skip
    """The gradient of `features._summarize`."""
    batch, (n, d), d_v = shift.shape[:-1], k.shape[-2:], v.shape[-1]
    m, (chunks, chunk) = side.width(d), _chunks(n)
    v, mask = with_whole_rows(v), None if mask is None else np.ascontiguousarray(mask)
    shift, grad_kv, grad_sum = map(np.ascontiguousarray, (shift, grad_kv, grad_sum))
    new = np.empty if mask is None else np.zeros
    grad_k, grad_v = new((*batch, n, d), k.dtype), new((*batch, n, d_v), k.dtype)
    grad_W = np.empty((chunks, *batch, m, d), k.dtype) if by_W else None
    run(
        summarize_gradient_kernel(k.dtype, side.is_elu), SUMMARIZE_GRADIENT_RECORD, batch, chunks, 3 * n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=chunk, chunk_step=math.prod(batch) * m,
        **side.fields(k), v=v, v_row=row_step(v), mask=mask, shift=shift, grad_kv=grad_kv, grad_sum=grad_sum,
        grad_k=grad_k, grad_v=grad_v, grad_W=None if grad_W is None else grad_W[0],
    )  # fmt: skip
    return ByKeys(grad_k, grad_v, None if grad_W is None else grad_W.sum(axis=0))


def _chunks(n: int) -> tuple[int, int]:
    """How many chunks, and the rows of each."""
    chunks = max(1, min(MOST_CHUNKS, n // CHUNK))
    return chunks, -(-n // chunks)
