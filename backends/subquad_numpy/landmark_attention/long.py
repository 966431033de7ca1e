"""Nyström attention of long sequences: four runs of kernels, whose tasks all threads share.

    q̃, means of segments of q;   B v, and k̃, means of segments of k;   A⁺ (B v);   F (A⁺ B v)

The attention of landmarks to keys adds up the means of the keys as it reads them, so that memory is read once for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.core.shapes import broadcast_batch
from subquad_numpy.block_attention import calls as block_attention
from subquad_numpy.block_attention.whole import as_intervals, chunks_of
from subquad_numpy.features.softmax_calls import softmax
from subquad_numpy.runtime.addresses import address_of
from subquad_numpy.runtime.arguments import Constant, Run, fix_rows, fixed, straight
from subquad_numpy.runtime.stored import stored_word, widest
from subquad_numpy.segment_means.calls import means_run

Array = np.ndarray[Any, Any]


def plan(arrays: Sequence[Any], static: Mapping[str, Any]) -> Callable[..., Any]:
    """The output of the kernel `landmark_attention` for arrays like these."""
    fixes = [fix_rows(x) for x in arrays]
    q, k, v = map(fixed, fixes, arrays)
    m, scale, dtype = static["m"], static["scale"], widest(q, k, v)
    batch = broadcast_batch(q=q.shape[:-2], k=k.shape[:-2], v=v.shape[:-2])
    of_queries, of_keys = (*q.shape[:-2], m, q.shape[-1]), (*batch, m, k.shape[-1])
    of_values = *batch, m, v.shape[-1]
    q_land, k_land, values = (np.empty(shape, dtype) for shape in (of_queries, of_keys, of_values))
    find_queries = means_run(q, m, q_land, finite=True)
    read_keys, intervals, of_parts = _reading_of_keys(q_land, k, v, k_land, batch, scale)
    find_values, among = _values(q_land, k_land, values, of_parts, batch, static)
    read_landmarks = softmax.planned((q, k_land, values, None), {"scale": scale, "visible": None}, save=False)

    def attend(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> Any:
        q, k, v = arrays
        q_land, values, parts = (np.empty(shape, dtype) for shape in (of_queries, of_values, of_parts))
        levels = np.empty(of_parts[:-1], dtype) if len(intervals[0].shape) > 1 else None
        k_land = np.zeros(of_keys, dtype)
        find_queries((q, q_land), threads)
        read_keys((q_land, k, v, *intervals, parts, levels, k_land), threads)
        find_values((q_land, k_land, parts, levels, values), threads)
        return read_landmarks((q, k_land, values, None), new, threads)

    def attend_fixed(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> Any:
        return attend([*map(fixed, fixes, arrays)], new, threads)

    attend.among = among  # type: ignore[attr-defined]  # whose memory a run reads
    if any(fixes):
        return attend_fixed
    return straight(attend) if getattr(read_landmarks, "is_straight", False) else attend


def _reading_of_keys(
    q_land: Array, k: Array, v: Array, k_land: Array, batch: tuple[int, ...], scale: float
) -> tuple[Run, tuple[Array, Array], tuple[int, ...]]:
    """(the run of landmarks of queries over all keys, the intervals of chunks, the shape of outputs over chunks)."""
    from subquad_numpy.block_attention.forward import FORWARD_RECORD, block_attention_kernel

    m, dtype = q_land.shape[-2], q_land.dtype
    given, options, chunks = by_segments(q_land, k, v, scale)
    record, of_record, tasks, products = block_attention.record(given, options)
    record, tasks = block_attention.with_many_rows(record, tasks, of_record, options)
    shape = *((chunks,) if chunks > 1 else ()), *batch, m, v.shape[-1]
    parts, levels = np.empty(shape, dtype), np.empty(shape[:-1], dtype)
    record |= {"segments": m, "stored": stored_word((q_land, k, v, parts)), "key_means": k_land}
    record |= {"out": parts, "lse": levels if chunks > 1 else None}
    names = "q", "k", "v", "start", "stop", "out", "lse", "key_means"
    run = Run(block_attention_kernel(dtype), FORWARD_RECORD, of_record, tasks, products, record, names)
    return run, (record["start"], record["stop"]), shape


def by_segments(q_land: Any, k: Any, v: Any, scale: float) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """(arrays and options of the kernel `block_attention`, chunks) of the landmarks of queries over all keys.

    Chunks consist of whole segments.
    """
    m, n_kv = q_land.shape[-2], k.shape[-2]
    chunks = min(chunks_of((q_land, k)), m)
    first = np.arange(chunks + 1) * m // chunks  # segments of chunks
    edges = first * (n_kv // m) + np.minimum(first, n_kv % m)
    given, options = as_intervals((q_land, k, v, None), {"scale": scale}, chunks, edges.astype(np.int32))
    return given, options | {"segments": m}, chunks


def _values(
    q_land: Array, k_land: Array, values: Array, of_parts: tuple[int, ...], batch: tuple[int, ...],
    static: Mapping[str, Any],
) -> tuple[Run, Run]:  # fmt: skip
    """(the run that writes A⁺ (B v), the record of an attention that it reads)."""
    from subquad_numpy.block_attention.forward import block_attention_kernel
    from subquad_numpy.iterative_pinv.kernel import pinv_kernel
    from subquad_numpy.landmark_attention.values import VALUES_RECORD, values_kernel

    (m, d), d_v, dtype, items = q_land.shape[-2:], values.shape[-1], q_land.dtype, math.prod(batch)
    eye, parts = np.eye(m, dtype=dtype), np.empty(of_parts, dtype)
    like = np.empty((m, d), dtype)
    among = attention_record((like, like, eye), dtype, static["scale"])
    chunks = of_parts[0] if len(of_parts) > len(batch) + 2 else 1
    products = float(m) * m * (d + m + d_v + 4 * static["iterations"] * m)
    numbers = {
        "m": m, "d": d, "d_v": d_v, "iterations": static["iterations"], "chunks": chunks,
        "attend": block_attention_kernel(dtype).address, "invert": pinv_kernel(dtype).address,
        "among": address_of(among.records), "part_step": items * m * d_v, "level_step": items * m,
    }  # fmt: skip
    levels = np.empty(of_parts[:-1], dtype)
    given = {"q": q_land, "k": k_land, "parts": parts, "levels": levels, "values": values}
    record = {**numbers, **given, "eye": Constant(eye)}
    run = Run(values_kernel(dtype), VALUES_RECORD, batch, 1, products, record, given)
    return run, among


def attention_record(arrays: Sequence[Array], out_dtype: Any, scale: float, **steps: int) -> Run:
    """The record of an attention of arrays like these, without their addresses; `steps` are strides of rows."""
    from subquad_numpy.block_attention.forward import FORWARD_RECORD, block_attention_kernel

    values, batch, tasks, products = block_attention.record(*as_intervals((*arrays, None), {"scale": scale}, 1))
    values |= {name: Constant(values[name]) for name in ("start", "stop")} | steps
    out = np.empty((arrays[0].shape[0], arrays[2].shape[1]), out_dtype)
    values |= {"out": out, "stored": stored_word((*arrays, out))}
    return Run(block_attention_kernel(widest(*arrays)), FORWARD_RECORD, batch, tasks, products, values)
