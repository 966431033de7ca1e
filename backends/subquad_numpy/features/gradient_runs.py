"""Gradients of attention through features, and of softmax attention, on NumPy arrays: see `gradients`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from subquad_numpy import array_api as xp
from subquad_numpy.block_attention import whole
from subquad_numpy.features import gradients
from subquad_numpy.features.gradients import ByKeys, ByQueries, ByStep
from subquad_numpy.features.operand import Operand, Rows, keys_of, queries_of
from subquad_numpy.features.runs import MAX_CHUNKS, Array, Arrays
from subquad_numpy.features.softmax_calls import RowSums
from subquad_numpy.features.step_calls import Trace
from subquad_numpy.runtime.arguments import row_step, run, with_whole_items, with_whole_rows
from subquad_numpy.runtime.stored import in_float32

GRADIENT_CHUNK = 2048  # minimum rows of a task


def summarize_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: None, outputs: Arrays, grads: Arrays, need: Sequence[bool],
    *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of `summarize`."""
    return gradients.by_summarize(OnHost(threads), arrays, static, outputs, grads, need)


def attend_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: None, outputs: Arrays, grads: Arrays, need: Sequence[bool],
    *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of `attend`."""
    return gradients.by_attend(OnHost(threads), arrays, static, outputs, grads, need)


def step_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: Trace | None, outputs: Arrays, grads: Arrays,
    need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...] | None:  # fmt: skip
    """The gradients of `step`, or None: see `gradients.by_step`; also where the forward pass saved nothing."""
    if saved is None:
        return None
    return gradients.by_step(OnHost(threads), arrays, static, outputs, grads, need, saved)


def softmax_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: RowSums | Array | None, outputs: Arrays, grads: Arrays,
    need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of `softmax`: by tiles they read half precision as it is stored, by features they convert it."""
    if isinstance(saved, np.ndarray):  # the log-sum-exp, of attention by tiles
        return whole.backward(arrays, static, saved, outputs[0], grads[0], need, threads=threads)
    return _softmax_backward(arrays, static, saved, outputs, grads, need, threads=threads)


@in_float32
def _softmax_backward(
    arrays: Arrays, static: Mapping[str, Any], saved: RowSums | None, outputs: Arrays, grads: Arrays,
    need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    return gradients.by_softmax(OnHost(threads), arrays, static, outputs, grads, saved or ())


class OnHost:
    """The `gradients.Passes` of NumPy arrays of any strides."""

    xp, keys, queries = xp, staticmethod(keys_of), staticmethod(queries_of)

    def __init__(self, threads: int | None) -> None:
        self.threads = threads

    def directions(self, rows: Array, scale: float) -> Operand:
        """The operand whose directions are rows."""
        return Operand(rows.swapaxes(-1, -2), scale)

    def by_queries(
        self, q: Array, side: Operand, start: Array | None, kv: Array, k_sum: Array | None, out: Array, grad: Array,
        *, by_W: bool,
    ) -> ByQueries:  # fmt: skip
        """The gradients of queries that read sums."""
        from subquad_numpy.features.attend_gradient import ATTEND_GRADIENT_RECORD, attend_gradient_kernel

        batch, (n, d), d_v = grad.shape[:-2], q.shape[-2:], kv.shape[-1]
        m, (chunks, chunk) = side.width(d), chunks_of(n)
        kv, out, grad = map(with_whole_rows, (kv, out, grad))
        start, k_sum = (None if x is None else with_whole_items(x, 2) for x in (start, k_sum))
        grad_q = np.empty((*batch, n, d), q.dtype)
        widths = (d_v, 1, d) if by_W else (d_v, 1)
        grads = [np.empty((chunks, *batch, m, width), q.dtype) for width in widths]
        run(
            attend_gradient_kernel(q.dtype, side.phi), ATTEND_GRADIENT_RECORD, batch, chunks, 3 * n * d * m,
            self.threads, n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=chunk, chunk_step=math.prod(batch) * m,
            **Rows(q, side).fields(q, side), start=start, kv=kv, kv_row=row_step(kv), k_sum=k_sum,
            out=out, out_row=row_step(out), grad=grad, grad_row=row_step(grad),
            grad_q=grad_q, grad_kv=grads[0][0], grad_sum=grads[1][0], grad_W=grads[2][0] if by_W else None,
        )  # fmt: skip
        sums = [x[0] if chunks == 1 else x.sum(axis=0) for x in grads]
        return ByQueries(grad_q, sums[0], sums[1], sums[2] if by_W else None)

    def by_keys(
        self, k: Array, v: Array, side: Operand, mask: Array | None, shift: Array, grad_kv: Array, grad_sum: Array,
        *, by_W: bool,
    ) -> ByKeys:  # fmt: skip
        """The gradients of sums over keys."""
        from subquad_numpy.features.summarize_gradient import SUMMARIZE_GRADIENT_RECORD, summarize_gradient_kernel

        batch, (n, d), d_v = shift.shape[:-2], k.shape[-2:], v.shape[-1]
        m, (chunks, chunk) = side.width(d), chunks_of(n)
        v, mask = with_whole_rows(v), None if mask is None else with_whole_items(mask, 1)
        shift, grad_kv, grad_sum = (with_whole_items(x, 2) for x in (shift, grad_kv, grad_sum))
        new = np.empty if mask is None else np.zeros
        grad_k, grad_v = new((*batch, n, d), k.dtype), new((*batch, n, d_v), k.dtype)
        grad_W = np.empty((chunks, *batch, m, d), k.dtype) if by_W else None
        run(
            summarize_gradient_kernel(k.dtype, side.phi), SUMMARIZE_GRADIENT_RECORD, batch, chunks, 3 * n * d * m,
            self.threads, n=n, d=d, m=m, d_v=d_v, chunks=chunks, chunk=chunk, chunk_step=math.prod(batch) * m,
            **Rows(k, side).fields(k, side), v=v, v_row=row_step(v), mask=mask,
            shift=shift, grad_kv=grad_kv, grad_sum=grad_sum,
            grad_k=grad_k, grad_v=grad_v, grad_W=None if grad_W is None else grad_W[0],
        )  # fmt: skip
        return ByKeys(grad_k, grad_v, None if grad_W is None else grad_W.sum(axis=0))

    def by_step(self, arrays: Arrays, phi: Any, outputs: Arrays, grads: Arrays, saved: Arrays) -> ByStep:
        """The gradients of a causal step."""
        from subquad_numpy.features.step_gradient import STEP_GRADIENT_RECORD, step_gradient_kernel

        q, k, v, _, kv, k_sum, *weights, key_mask = arrays
        out, new_shift, *_ = outputs
        grad, _, *by_after = grads
        level, shifts = saved
        keys, queries = keys_of(phi, weights), queries_of(phi, weights)
        batch, (n, d), d_v = out.shape[:-2], q.shape[-2:], v.shape[-1]
        m = keys.width(d)
        mask = None if key_mask is None else with_whole_items(key_mask, 1)
        v_rows, out, grad = map(with_whole_rows, (v, out, grad))
        kv, k_sum, new_shift, after_kv, after_sum = (
            None if x is None else with_whole_items(x, 2) for x in (kv, k_sum, new_shift, *by_after)
        )
        by_q, by_k, by_v = (np.empty((*batch, n, width), q.dtype) for width in (d, d, d_v))
        by_kv, by_sum = np.empty((*batch, m, d_v), q.dtype), np.empty((*batch, m, 1), q.dtype)
        run(
            step_gradient_kernel(q.dtype, keys.phi), STEP_GRADIENT_RECORD, batch, 1, 9 * n * d * m, self.threads,
            n=n, d=d, m=m, d_v=d_v, chunks=1, chunk=n,
            **Rows(k, keys).fields(k, keys), v=v_rows, v_row=row_step(v_rows), mask=mask,
            **Rows(q, queries).fields(q, queries, "q_"), kv=kv, k_sum=k_sum, level=level, shifts=shifts,
            out=out, out_row=row_step(out), grad=grad, grad_row=row_step(grad),
            new_shift=new_shift, grad_new_kv=after_kv, grad_new_sum=after_sum,
            grad_q=by_q, grad_k=by_k, grad_v=by_v, grad_kv=by_kv, grad_sum=by_sum,
        )  # fmt: skip
        return ByStep(by_q, by_k, by_v, by_kv, by_sum)


def chunks_of(n: int) -> tuple[int, int]:
    """(chunks, rows of a chunk) of the gradient for n rows."""
    chunks = max(1, min(MAX_CHUNKS, n // GRADIENT_CHUNK))
    return chunks, -(-n // chunks)
