"""Nyström attention in one call, on NumPy arrays and tensors: of short sequences in one run of a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.backend import Call
from subquad.core.override import PLAIN
from subquad.core.shapes import broadcast_batch
from subquad_numpy.conditions import small_inverse, stored
from subquad_numpy.landmark_attention import long
from subquad_numpy.landmark_attention.long import attention_record
from subquad_numpy.runtime.addresses import address_of
from subquad_numpy.runtime.arguments import SMALL, Constant, Forms, Run, fix_rows, fixed, row_step, straight
from subquad_numpy.runtime.stored import stored_word, widest

Array = np.ndarray[Any, Any]
LEAST = 16  # landmarks of long calls: fewer of them fill no tile of rows


def segments_of_rows(call: Call) -> str | None:
    """The reason to leave a call to the kernels `softmax_attention` and `iterative_pinv`, or None."""
    m = call.static["m"]
    reason = stored(call) or small_inverse(m)
    if reason is not None:
        return reason
    if call.conditions != PLAIN:
        return "calls that are recorded, traced or transformed go by the kernels that it is made of"
    if 0 in [length for x in call.arrays for length in x.shape]:
        return "an axis is empty"
    if m < LEAST and not _is_short(call.arrays, call.static):
        return f"long calls with fewer than {LEAST} landmarks go by the kernels that it is made of"
    return None


def _is_short(arrays: Sequence[Any], static: Mapping[str, Any]) -> bool:
    """Whether one thread computes the call, in one run."""
    items = math.prod(broadcast_batch(**{name: x.shape[:-2] for name, x in zip("qkv", arrays, strict=True)}))
    return items * _products(arrays, static) < SMALL


def _products(arrays: Sequence[Any], static: Mapping[str, Any]) -> float:
    """Multiply-adds of an item."""
    q, k, v = arrays
    m, d, d_v = static["m"], q.shape[-1], v.shape[-1]
    return float(m) * ((q.shape[-2] + k.shape[-2] + m) * (d + d_v) + 4 * static["iterations"] * m * m)


def _plan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`landmark_attention`: the output."""
    if not _is_short(arrays, static):
        return long.plan(arrays, static)
    from subquad_numpy.block_attention.forward import block_attention_kernel
    from subquad_numpy.iterative_pinv.kernel import pinv_kernel
    from subquad_numpy.landmark_attention.kernel import LANDMARK_RECORD, landmark_attention_kernel

    fixes = [fix_rows(x) for x in arrays]
    q, k, v = map(fixed, fixes, arrays)
    m, scale, dtype = static["m"], static["scale"], widest(q, k, v)
    (n, d), (n_kv, d_v) = q.shape[-2:], v.shape[-2:]
    batch = broadcast_batch(q=q.shape[:-2], k=k.shape[:-2], v=v.shape[:-2])
    shape, out_dtype = (*batch, n, d_v), q.dtype
    steps = {"q_row": row_step(q)}, {"k_row": row_step(k), "v_row": row_step(v)}
    q_land, values = np.empty((m, d), dtype), np.empty((m, d_v), dtype)
    item_q, item_k, item_v = (np.empty(x.shape[-2:], x.dtype) for x in (q, k, v))
    parts = {
        "among": attention_record((q_land, q_land, np.empty((m, m), dtype)), dtype, scale),
        "of_keys": attention_record((q_land, item_k, item_v), dtype, scale, **steps[1]),
        "of_queries": attention_record((item_q, q_land, values), out_dtype, scale, **steps[0]),
    }
    run = Run(
        landmark_attention_kernel(dtype), LANDMARK_RECORD, batch, 1, _products(arrays, static),
        {
            "n": n, "n_kv": n_kv, "m": m, "d": d, "d_v": d_v, **steps[0], **steps[1],
            "iterations": static["iterations"], "stored": stored_word((q, k)),
            "attend": block_attention_kernel(dtype).address, "invert": pinv_kernel(dtype).address,
            **{name: address_of(part.records) for name, part in parts.items()},
            "q": q, "k": k, "v": v, "eye": Constant(np.eye(m, dtype=dtype)), "out": np.empty(shape, out_dtype),
        },
        ("q", "k", "v", "out"),
    )  # fmt: skip

    def attend(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array], Any]:
        out, (q, k, v) = new(shape, out_dtype), arrays
        run((q, k, v, out), threads)
        return (out,), None

    def attend_fixed(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array], Any]:
        return attend([*map(fixed, fixes, arrays)], new, threads)

    attend.parts = parts  # type: ignore[attr-defined]  # whose memory the run reads
    return attend_fixed if any(fixes) else straight(attend)


landmark_attention = Forms(_plan)
