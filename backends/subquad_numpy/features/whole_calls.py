"""Attention through features of a whole call, in one run of a kernel, on NumPy arrays and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from subquad.backend import Call
from subquad.core.override import PLAIN
from subquad.core.shapes import broadcast_batch
from subquad.kernels.feature_sums import keys_batch
from subquad_numpy.conditions import fused_features
from subquad_numpy.features.operand import Rows, keys_of, operand_from, queries_of
from subquad_numpy.features.runs import QUERIES, SUMMARY_CHUNK, Array, New
from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fix_rows, fixed, row_step, straight
from subquad_numpy.runtime.stored import stored_word, widest

MOST_QUERIES, MOST_KEYS = 1024, 2 * SUMMARY_CHUNK - 1  # more are read, or summed up, by several tasks


def of_one_task(call: Call) -> str | None:
    """The reason to leave a call to the kernels `feature_summarize` and `feature_attend`, or None."""
    reason = fused_features(call)
    if reason is not None:
        return reason
    (q, k, v), weights, phi = call.arrays[:3], call.arrays[3:], call.static["phi"]
    if call.conditions != PLAIN:
        return "calls that are recorded, traced or transformed go by the kernels that it is made of"
    m, _ = phi.sizes(k.shape[-1], *weights)
    if q.shape[-2] > MOST_QUERIES or k.shape[-2] > MOST_KEYS or m > QUERIES:
        return f"it is for at most {MOST_QUERIES} queries, {MOST_KEYS} keys and {QUERIES} features"
    kept = keys_batch(phi, weights, k, v, call.key_mask)
    batch = broadcast_batch(q=q.shape[:-2], state=kept, center=phi.batch(*weights))
    return None if tuple(kept) == tuple(batch) else "queries of several items read the same keys"


def _plan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`feature_whole`: the output of queries that read all keys."""
    from subquad_numpy.features.whole import WHOLE_RECORD, whole_kernel

    q, k, v, *weights, key_mask = arrays
    phi, dtype = static["phi"], widest(k, v)
    keys, queries = keys_of(phi, weights), queries_of(phi, weights)
    of_keys, of_queries = operand_from(keys_of, phi, weights), operand_from(queries_of, phi, weights)
    batch = keys_batch(phi, weights, k, v, key_mask)
    (n_q, d), n, d_v = q.shape[-2:], k.shape[-2], v.shape[-1]
    m, shape, out_dtype = keys.width(d), (*batch, n_q, d_v), q.dtype
    rows_k, rows_q = Rows(k, keys), Rows(q, queries)
    fix_v, fix_mask = fix_rows(v), None if key_mask is None else fix_items(key_mask, 1)
    like_v, out = fixed(fix_v, v), np.empty(shape, out_dtype)
    run_of = partial(
        Run, whole_kernel(dtype, keys.phi), WHOLE_RECORD, batch, 1, (n + n_q) * d * m,
        {
            **rows_k.fields(k, keys), **rows_q.fields(q, queries, "q_"),
            "v": like_v, "v_row": row_step(like_v),
            "mask": None if key_mask is None else fixed(fix_mask, key_mask),
            "n": n, "n_q": n_q, "d": d, "m": m, "d_v": d_v, "chunks": 1, "chunk": n, "out": out,
            "stored": stored_word((k, v, q, out)),
        },
    )  # fmt: skip

    def of_rows(arrays: Sequence[Any], new: New, threads: Any) -> tuple[tuple[Array], None]:
        out, (q, k, v, key_mask) = new(shape, out_dtype), arrays
        run((k, v, key_mask, q, out), threads)
        return (out,), None

    def whole(arrays: Sequence[Any], new: New, threads: Any) -> tuple[tuple[Array], None]:
        q, k, v, *weights, key_mask = arrays
        if fix_v is not None:
            v = fix_v(v)
        if fix_mask is not None:
            key_mask = fix_mask(key_mask)
        out = new(shape, out_dtype)
        run((*rows_k(k, *of_keys(weights)), v, key_mask, *rows_q(q, *of_queries(weights)), out), threads)
        return (out,), None

    is_straight = fix_v is fix_mask is None and rows_k.is_straight and rows_q.is_straight and len(weights) <= 2
    if is_straight and not weights:
        run = run_of(("x", "v", "mask", "q_x", "out"))
        return straight(of_rows, short=run.small)
    run = run_of()
    return straight(whole, short=run.small) if is_straight else whole


whole = Forms(_plan)
