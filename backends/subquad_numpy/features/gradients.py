"""Gradients of attention through features, and of softmax attention, on NumPy arrays by compiled kernels.

Each function is the backward pass of the forward pass in `calls` that has its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from subquad.kernels.max_shift import finite_shift
from subquad_numpy.features.calls import MAX_CHUNKS, Array, Arrays, RowSums, Trace, hide
from subquad_numpy.features.operand import Operand, Rows, keys_of, queries_of
from subquad_numpy.runtime.arguments import row_step, run, with_whole_items, with_whole_rows

GRADIENT_CHUNK = 2048  # minimum rows of a task


def summarize_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: None, outputs: Arrays, grads: Arrays, need: Sequence[bool],
    *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of `summarize`; the new shift counts as a constant."""
    k, v, shift, numerator, denominator, *weights, key_mask = arrays
    keys = keys_of(static["phi"], weights)
    finite = finite_shift(np, outputs[0])
    by_numerator, by_denominator = (
        np.zeros_like(x) if by is None else by for by, x in zip(grads[1:], outputs[1:], strict=True)
    )
    by_W = any(need[5:7]) or len(weights) > 2
    found = _by_keys(k, v, keys, key_mask, finite, by_numerator, by_denominator, by_W=by_W, threads=threads)
    by: list[Array | None] = [found.k, found.v, None, None, None]
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


def attend_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: None, outputs: Arrays, grads: Arrays, need: Sequence[bool],
    *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of `attend`."""
    q, shift, numerator, denominator, *weights = arrays
    queries = queries_of(static["phi"], weights)
    found = _by_queries(
        q, queries, finite_shift(np, shift), numerator, denominator, outputs[0], grads[0],
        by_W=len(weights) > 1 and need[5], threads=threads,
    )  # fmt: skip
    by_numerator = sum_to(found.kv, numerator.shape)
    by_denominator = sum_to(found.k_sum, denominator.shape)
    by: list[Array | None] = [found.q, None, by_numerator, by_denominator, *[None] * len(weights)]
    if need[1]:
        by[1] = _by_shift(numerator, denominator, by_numerator, by_denominator)
    if found.W is not None:
        by[5] = sum_to(found.W, (*weights[1].shape[:-2], *found.W.shape[-2:])).swapaxes(-1, -2)
    if len(weights) > 2:
        by[6] = -sum_to(found.q.sum(axis=-2, keepdims=True), weights[2].shape)
    return tuple(by)


def step_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: Trace | None, outputs: Arrays, grads: Arrays,
    need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...] | None:  # fmt: skip
    """The gradients of `step`.

    None where weights need a gradient, there are centers, the state after has a gradient, or nothing was saved.
    """
    q, k, v, shift, numerator, denominator, *weights, key_mask = arrays
    grad, *by_after = grads
    if saved is None or grad is None or len(weights) > 2 or any(need[6:8]) or any(x is not None for x in by_after):
        return None
    from subquad_numpy.features.step_gradient import STEP_GRADIENT_RECORD, step_gradient_kernel

    phi = static["phi"]
    keys, queries = keys_of(phi, weights), queries_of(phi, weights)
    batch, (n, d), d_v = grad.shape[:-2], q.shape[-2:], v.shape[-1]
    m = keys.width(d)
    mask = None if key_mask is None else with_whole_items(key_mask, 1)
    v_rows, out, grad = map(with_whole_rows, (v, outputs[0], grad))
    by_q, by_k, by_v = (np.empty((*batch, n, width), q.dtype) for width in (d, d, d_v))
    by_kv, by_sum = np.empty((*batch, m, d_v), q.dtype), np.empty((*batch, m, 1), q.dtype)
    run(
        step_gradient_kernel(q.dtype, keys.phi), STEP_GRADIENT_RECORD, batch, 1, 9 * n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=1, chunk=n,
        **Rows(k, keys).fields(k, keys), v=v_rows, v_row=row_step(v_rows), mask=mask,
        **Rows(q, queries).fields(q, queries, "q_"), kv=saved.numerator, k_sum=saved.denominator,
        level=saved.level, shifts=saved.shifts,
        out=out, out_row=row_step(out), grad=grad, grad_row=row_step(grad),
        grad_q=by_q, grad_k=by_k, grad_v=by_v, grad_kv=by_kv, grad_sum=by_sum,
    )  # fmt: skip
    by: list[Array | None] = [by_q, by_k, by_v]
    if shift is None:
        by += [None, None, None]
    else:
        by_numerator, by_denominator = sum_to(by_kv, numerator.shape), sum_to(by_sum, denominator.shape)
        by_shift = _by_shift(numerator, denominator, by_numerator, by_denominator) if need[3] else None
        by += [by_shift, by_numerator, by_denominator]
    return (*by, *[None] * len(weights), None)


def softmax_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: RowSums | None, outputs: Arrays, grads: Arrays,
    need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of `softmax`."""
    q, k, v, key_mask = arrays
    (out,), (grad,), scale = outputs, grads, static["scale"]
    if saved is None:  # a small number of keys: they are the directions of the queries
        keys, values, start = hide(k, v, key_mask)
        operand = Operand(keys.swapaxes(-1, -2), scale)
        found = _by_queries(q, operand, start, values, None, out, grad, by_W=True, threads=threads)
        assert found.W is not None
        by_q, by_k, by_v = found.q, scale * found.W, found.kv
        if key_mask is not None:
            if not (seen := key_mask.any(axis=-1)).all():
                by_q[np.broadcast_to(~seen, grad.shape[:-2])] = 0
            keep = key_mask[..., None]  # 0 · NaN is NaN: a query that is NaN must not reach a hidden key
            by_k, by_v = np.where(keep, by_k, 0), np.where(keep, by_v, 0)
    else:
        by_kv = grad / saved.total
        operand, by_sum = Operand(q.swapaxes(-1, -2), scale), -(by_kv * out).sum(axis=-1, keepdims=True)
        of_keys = _by_keys(k, v, operand, key_mask, saved.shift, by_kv, by_sum, by_W=True, threads=threads)
        assert of_keys.W is not None
        by_q, by_k, by_v = scale * of_keys.W, of_keys.k, of_keys.v
    return by_q, by_k, by_v, None


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """x summed over the axes that broadcasting from `shape` added or lengthened."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape)))) if x.ndim > len(shape) else x
    once = tuple(axis for axis, size in enumerate(shape) if size == 1 != x.shape[axis])
    return x.sum(axis=once, keepdims=True) if once else x


# Runs of one kernel -------------------------------------------------------------------------------------------------


class ByQueries(NamedTuple):
    """Gradients by the queries, the numerator and the denominator, and by the directions, (m, d), if asked for."""

    q: Array
    kv: Array
    k_sum: Array
    W: Array | None


class ByKeys(NamedTuple):
    """Gradients by the keys and the values, and by the directions, (m, d), if asked for."""

    k: Array
    v: Array
    W: Array | None


def _by_queries(
    q: Array, side: Operand, start: Array | None, kv: Array, k_sum: Array | None, out: Array, grad: Array, *,
    by_W: bool, threads: int | None,
) -> ByQueries:  # fmt: skip
    """The gradients of what `_Reading` computes."""
    from subquad_numpy.features.attend_gradient import ATTEND_GRADIENT_RECORD, attend_gradient_kernel

    batch, (n, d), d_v = grad.shape[:-2], q.shape[-2:], kv.shape[-1]
    m, (chunks, chunk) = side.width(d), _chunks(n)
    kv, out, grad = map(with_whole_rows, (kv, out, grad))
    start, k_sum = (None if x is None else with_whole_items(x, 2) for x in (start, k_sum))
    grad_q = np.empty((*batch, n, d), q.dtype)
    widths = (d_v, 1, d) if by_W else (d_v, 1)
    grads = [np.empty((chunks, *batch, m, width), q.dtype) for width in widths]
    run(
        attend_gradient_kernel(q.dtype, side.phi), ATTEND_GRADIENT_RECORD, batch, chunks, 3 * n * d * m, threads,
        n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=chunk, chunk_step=math.prod(batch) * m,
        **Rows(q, side).fields(q, side), start=start, kv=kv, kv_row=row_step(kv), k_sum=k_sum,
        out=out, out_row=row_step(out), grad=grad, grad_row=row_step(grad),
        grad_q=grad_q, grad_kv=grads[0][0], grad_sum=grads[1][0], grad_W=grads[2][0] if by_W else None,
    )  # fmt: skip
    sums = [x[0] if chunks == 1 else x.sum(axis=0) for x in grads]
    return ByQueries(grad_q, sums[0], sums[1], sums[2] if by_W else None)


def _by_keys(
    k: Array, v: Array, side: Operand, mask: Array | None, shift: Array, grad_kv: Array, grad_sum: Array, *,
    by_W: bool, threads: int | None,
) -> ByKeys:  # fmt: skip
    """The gradients of what `_Sums` computes; the shift must be finite, and have the batch shape of the call."""
    from subquad_numpy.features.summarize_gradient import SUMMARIZE_GRADIENT_RECORD, summarize_gradient_kernel

    batch, (n, d), d_v = shift.shape[:-2], k.shape[-2:], v.shape[-1]
    m, (chunks, chunk) = side.width(d), _chunks(n)
    v, mask = with_whole_rows(v), None if mask is None else with_whole_items(mask, 1)
    shift, grad_kv, grad_sum = (with_whole_items(x, 2) for x in (shift, grad_kv, grad_sum))
    new = np.empty if mask is None else np.zeros
    grad_k, grad_v = new((*batch, n, d), k.dtype), new((*batch, n, d_v), k.dtype)
    grad_W = np.empty((chunks, *batch, m, d), k.dtype) if by_W else None
    run(
        summarize_gradient_kernel(k.dtype, side.phi), SUMMARIZE_GRADIENT_RECORD, batch, chunks, 3 * n * d * m,
        threads, n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=chunk, chunk_step=math.prod(batch) * m,
        **Rows(k, side).fields(k, side), v=v, v_row=row_step(v), mask=mask,
        shift=shift, grad_kv=grad_kv, grad_sum=grad_sum,
        grad_k=grad_k, grad_v=grad_v, grad_W=None if grad_W is None else grad_W[0],
    )  # fmt: skip
    return ByKeys(grad_k, grad_v, None if grad_W is None else grad_W.sum(axis=0))


def _chunks(n: int) -> tuple[int, int]:
    """(chunks, rows of a chunk) of the gradient for n rows."""
    chunks = max(1, min(MAX_CHUNKS, n // GRADIENT_CHUNK))
    return chunks, -(-n // chunks)


def _by_shift(numerator: Array, denominator: Array, by_numerator: Array, by_denominator: Array) -> Array:
    """The gradient by the shift of a state that is read: its sums are over exp(shift)."""
    return (numerator * by_numerator).sum(axis=-1, keepdims=True) + denominator * by_denominator
