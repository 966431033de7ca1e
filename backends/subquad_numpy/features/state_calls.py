"""Attention through features by way of a state, on NumPy arrays by compiled kernels: `summarize` and `attend`.

A state consists of these arrays, each after the batch axes:

    shift (m, 1)    numerator (m, d_v)    denominator (m, 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from subquad.kernels.max_shift import finite_shift
from subquad_numpy.features.operand import keys_of, operand_from, queries_of
from subquad_numpy.features.runs import Array, Arrays, New, Planned, Reading, Sums, center_batch, mask_batch
from subquad_numpy.runtime.arguments import Forms, straight


def _plan_summarize(arrays: Arrays, static: Mapping[str, Any], save: bool) -> Planned:
    """`feature_summarize`: the state with the keys k added."""
    k, v, old_shift, _, _, *weights, key_mask = arrays
    keys = keys_of(static["phi"], weights)
    operand = operand_from(keys_of, static["phi"], weights)
    batch = np.broadcast_shapes(k.shape[:-2], v.shape[:-2], mask_batch(key_mask), keys.batch)
    sums = Sums(batch, k, v, keys, key_mask)

    if old_shift is None and not weights and sums.is_straight:
        return straight(partial(sums.of_rows))

    def summarize(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array, ...], None]:
        k, v, _, _, _, *weights, key_mask = arrays
        return sums(k, v, key_mask, *operand(weights), new, threads), None

    if old_shift is None:
        return straight(summarize) if sums.is_straight and len(weights) <= 2 else summarize
    whole = np.broadcast_shapes(batch, old_shift.shape[:-2])
    column, matrix, dtype = (*whole, *sums.column[-2:]), (*whole, *sums.matrix[-2:]), sums.dtype

    def merge(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array, ...], None]:
        shift, numerator, denominator = arrays[2:5]
        (more_shift, more_numerator, more_denominator), _ = summarize(arrays, np.empty, threads)
        outputs = new(column, dtype), new(matrix, dtype), new(column, dtype)
        finite = finite_shift(np, np.maximum(shift, more_shift, out=outputs[0]))
        fade, fade_more = np.exp(shift - finite), np.exp(more_shift - finite)
        for old, more, out in ((numerator, more_numerator, outputs[1]), (denominator, more_denominator, outputs[2])):
            np.multiply(old, fade, out=out)
            out += more * fade_more
        return outputs, None

    return merge


def _plan_attend(arrays: Arrays, static: Mapping[str, Any], save: bool) -> Planned:
    """`feature_attend`: the output of queries that all read the whole state."""
    q, shift, numerator, denominator, *weights = arrays
    operand = operand_from(queries_of, static["phi"], weights)
    queries = queries_of(static["phi"], weights)
    batch = np.broadcast_shapes(q.shape[:-2], queries.batch, center_batch(weights), numerator.shape[:-2])
    shape, dtype = (*batch, q.shape[-2], numerator.shape[-1]), q.dtype
    read = Reading(batch, q, queries, shift, numerator, denominator, is_shift=True)

    def attend_by_rows(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], None]:
        out = new(shape, dtype)
        run((*arrays, out), threads)
        return (out,), None

    if not weights and read.is_straight:
        run = read.run_of(("x", "start", "kv", "k_sum", "out"))
        return straight(attend_by_rows, short=run.small)

    def attend(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], None]:
        q, shift, numerator, denominator, *weights = arrays
        out = new(shape, dtype)
        read(q, *operand(weights), shift, numerator, denominator, out, threads)
        return (out,), None

    return straight(attend) if read.is_straight and len(weights) <= 2 else attend


summarize, attend = Forms(_plan_summarize), Forms(_plan_attend)
