"""Softmax attention to all keys, or causally to those up to a row's own place: block attention without a list.

A small number of rows reads many keys in chunks, so that one long sequence occupies all threads. A chunk is an interval
more, on a batch axis of its own; the outputs over the chunks join by their log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.backend import Array as AnyArray
from subquad.backend import Like
from subquad.core.beside import namespace_of
from subquad.kernels.max_shift import finite_shift
from subquad.kernels.visibility import plain_sight
from subquad_numpy.block_attention import calls
from subquad_numpy.block_attention import launch as launches
from subquad_numpy.runtime.arguments import straight
from subquad_numpy.runtime.launch import Launch, Run, threads_for
from subquad_numpy.runtime.stored import rounded, widest

Array = np.ndarray[Any, Any]
CHUNK, MOST_CHUNKS = 4096, 16  # minimum keys of a chunk; maximum chunks, whose outputs take memory
SMALL_ROWS = 256  # maximum rows that read keys in chunks


def plan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The output of the kernel `softmax_attention`; the log-sum-exp is saved for the gradient."""
    chunks = chunks_of(arrays)
    given, options = as_intervals(arrays, static, chunks)
    dtype = arrays[0].dtype
    options |= {"needs_lse": save or chunks > 1, "out_dtype": dtype if chunks == 1 else widest(*arrays[:3])}
    (start, stop), planned = given[3:5], calls.block_attention.planned(given, options, save)

    def softmax_attention(
        arrays: Sequence[Any], new: Callable[..., Array], threads: Any
    ) -> tuple[tuple[Array], Array | None]:
        *rows, key_mask = arrays
        (out, lse), _ = planned(
            (*rows, start, stop, *calls.NO_LIST, key_mask), np.empty if chunks > 1 else new, threads
        )
        if chunks > 1:
            parts, levels = out, lse
            out = new(parts.shape[1:], dtype)
            whole, lse = _joined(parts, levels)
            out[...] = rounded(whole, dtype)
        return (out,), lse if save else None

    is_straight = chunks == 1 and getattr(planned, "is_straight", False)
    return straight(softmax_attention) if is_straight else softmax_attention


def backward(
    arrays: Sequence[Any], static: Mapping[str, Any], lse: Array, out: Array, grad: Array | None,
    need: Sequence[bool], *, threads: Any = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of the kernel `softmax_attention`."""
    given, options = as_intervals(arrays, static, 1)
    found = calls.block_attention_backward(given, options, None, (out, lse), (grad, None), need, threads=threads)
    return *found[:3], None


def launch_whole(
    arrays: Sequence[Any], static: Mapping[str, Any], run: Run, *, save: bool = False
) -> tuple[AnyArray, ...]:
    """The output of the kernel `softmax_attention`, by one launch; the log-sum-exp, (…, n, 1), is saved."""
    chunks = chunks_of(arrays)
    out, lse = launches.launch(*as_intervals(arrays, static, chunks), run)
    if chunks > 1:
        out, lse = launch_joined(out, lse, run)
    return (out, lse[..., None]) if save else (out,)


def launch_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], outputs: Sequence[AnyArray], grads: Sequence[AnyArray], run: Run
) -> tuple[AnyArray | None, ...]:
    """The gradients of the kernel `softmax_attention`, by one launch."""
    out, lse = outputs
    given, options = as_intervals(arrays, static, 1)
    by_lse = namespace_of(lse).zeros_like(lse[..., 0])
    found = launches.launch_backward(given, options, (out, lse[..., 0]), (grads[0], by_lse), run)
    return *found[:3], None


def chunks_of(arrays: Sequence[Any]) -> int:
    """The number of chunks of keys, which depends on the numbers of rows and keys alone."""
    n, n_kv = arrays[0].shape[-2], arrays[1].shape[-2]
    return max(1, min(MOST_CHUNKS, n_kv // CHUNK)) if n <= SMALL_ROWS else 1


def as_intervals(
    arrays: Sequence[Any], static: Mapping[str, Any], chunks: int, edges: Any = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arrays, with the mask last, and the options of the kernel `block_attention`, for those of this kernel.

    With chunks, the intervals have a first batch axis for these. `edges` are the keys at which chunks begin, and then
    n_kv; by default chunks have one length.
    """
    q, k, v, key_mask = arrays
    n_kv, right, xp = k.shape[-2], None if static.get("visible") is None else 0, namespace_of(q)
    _, start, stop = plain_sight(xp, q, q.shape[-2], n_kv, right=right)
    if chunks > 1:
        axes = max(*(x.ndim - 2 for x in (q, k, v)), 0 if key_mask is None else key_mask.ndim - 1)
        edges = xp.arange(chunks + 1, dtype=xp.int32) * -(-n_kv // chunks) if edges is None else edges
        begin, end = (xp.reshape(x, (chunks, *(1,) * axes, 1)) for x in (edges[:-1], edges[1:]))
        start, stop = xp.maximum(start, begin), xp.minimum(stop, end)
    options = {"scale": static["scale"], "size": 1, "from_first": chunks == 1}
    return (q, k, v, start, stop, *calls.NO_LIST, key_mask), options


def launch_joined(parts: AnyArray, levels: AnyArray, run: Run) -> tuple[AnyArray, AnyArray]:
    """(out, lse) over all keys, of outputs (chunks, …, n, d_v) and log-sum-exps (chunks, …, n) over chunks of them.

    By one launch: a compiler of programs would compute exponentials anew for each number of a row.
    """
    from subquad_numpy.block_attention.join import JOIN_RECORD, join_kernel

    chunks, *batch, n, d = parts.shape
    items, dtype = math.prod(batch), parts.dtype
    results = {"out": Like((*batch, n, d), dtype), "lse": Like((*batch, n), dtype)}
    sizes = {"n": n, "d": d, "chunks": chunks, "part_step": items * n * d, "level_step": items * n}
    made = Launch(
        join_kernel, (np.dtype(dtype),), JOIN_RECORD, results, sizes, tuple(batch),
        threads=threads_for(math.prod(parts.shape)),
    )  # fmt: skip
    found = run(made, {"parts": parts, "levels": levels})
    return found["out"], found["lse"]


def _joined(parts: Array, levels: Array) -> tuple[Array, Array]:
    """`launch_joined` on NumPy arrays."""
    top = finite_shift(np, np.max(levels, axis=0))
    shares = np.exp(levels - top)
    total = np.sum(shares, axis=0)
    divisor = np.where(total == 0, 1.0, total)
    out = np.sum(parts * shares[..., None], axis=0) / divisor[..., None]
    return out, np.where(total == 0, -math.inf, top + np.log(divisor))
