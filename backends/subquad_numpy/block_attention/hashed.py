"""The compiled attention of rows and keys that meet in rounds, on NumPy arrays, and its gradient.

Each round is one run of the kernels of block attention, which read rows by their order and join the output of the
rounds before in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.kernels.hashed_attention import key_chunks
from subquad_numpy.block_attention.calls import parts_of, record
from subquad_numpy.runtime.arguments import Run
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]


def hashed_attention(
    arrays: Sequence[Any], static: Mapping[str, Any], *, new: Callable[..., Array] = np.empty, save: bool = False,
    threads: Any = None,
) -> tuple[tuple[Array, Array], None]:  # fmt: skip
    """The output and the log-sum-exp of the kernel `hashed_attention`."""
    from subquad_numpy.block_attention.forward import FORWARD_RECORD, block_attention_kernel

    rounds = _rounds(arrays, static)
    q, v, batch = arrays[0], arrays[2], rounds[0][1]
    out, lse = new((*batch, q.shape[-2], v.shape[-1]), q.dtype), new((*batch, q.shape[-2]), q.dtype)
    kernel = block_attention_kernel(q.dtype)
    for values, _, tasks, products in rounds:
        before = {} if values["rounds"] == 0 else {"before_out": out, "before_lse": lse}
        _run(kernel, FORWARD_RECORD, batch, tasks, products, {**values, **before, "out": out, "lse": lse}, threads)
    return (out, lse), None


def hashed_attention_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: Any = None,
) -> tuple[Array | None, ...] | None:  # fmt: skip
    """The gradients by q, k and v, with the batch axes of the call."""
    from subquad_numpy.block_attention.backward import BACKWARD_RECORD, block_attention_gradient_kernel

    q, k, v, *_ = arrays
    (out, lse), (grad_out, grad_lse) = outputs, grads
    batch, items, dtype = lse.shape[:-1], math.prod(lse.shape[:-1]), q.dtype
    (n, d), n_kv, d_v, count = q.shape[-2:], k.shape[-2], v.shape[-1], thread_count(threads)
    rounds = _rounds(arrays, static)
    tiles = rounds[0][2]
    parts = parts_of(items, tiles, count)
    by_q, by_k, by_v = (
        np.zeros(shape, dtype) for shape in ((*batch, n, d), (parts, *batch, n_kv, d), (parts, *batch, n_kv, d_v))
    )
    shared = {
        "out": np.ascontiguousarray(out), "lse": np.ascontiguousarray(lse),
        "grad_out": np.zeros(out.shape, dtype) if grad_out is None else np.ascontiguousarray(grad_out, dtype),
        "grad_lse": None if grad_lse is None else np.ascontiguousarray(grad_lse, dtype),
        "grad_q": by_q, "grad_k": by_k[0], "grad_v": by_v[0],
        "tiles": tiles, "parts": parts, "k_step": items * n_kv * d, "v_step": items * n_kv * d_v,
    }  # fmt: skip
    kernel = block_attention_gradient_kernel(dtype)
    for values, _, _, products in rounds:
        _run(kernel, BACKWARD_RECORD, batch, parts, 3 * products, {**values, **shared}, threads)
    by_k, by_v = (x[0] if parts == 1 else x.sum(axis=0) for x in (by_k, by_v))
    return by_q, by_k, by_v, *[None] * (len(arrays) - 3)


def _run(
    kernel: Any, fields: Mapping[str, Any], batch: tuple[int, ...], tasks: int, products: float,
    values: Mapping[str, Any], threads: Any,
) -> None:  # fmt: skip
    run = Run(kernel, dict(fields), batch, tasks, products, values)
    run([values.get(name) for name, axes in fields.items() if axes is not None], threads)


def _rounds(
    arrays: Sequence[Any], static: Mapping[str, Any]
) -> list[tuple[dict[str, Any], tuple[int, ...], int, float]]:
    """(fields of the argument record, batch, tasks of an item, multiply-adds of an item) of each round."""
    q, k, v, start, stop, avoid, order_q, order_k, mask = arrays
    n, n_kv, size, rounds = q.shape[-2], k.shape[-2], static["size"], order_q.shape[-2]
    own = key_chunks(np, n, n_kv, size, q)  # type: ignore[arg-type]
    blocks = np.stack([own - 1, own], axis=-1)
    columns = max(rounds - 1, 1)  # what the last round meets, no round asks for
    met_q, met_k = (np.empty((*x.shape[:-2], x.shape[-1], columns), np.int32) for x in (order_q, order_k))
    for met, order, chunks in ((met_q, order_q, own), (met_k, order_k, np.arange(-(-n_kv // size), dtype=np.int32))):
        of_place = chunks[np.arange(order.shape[-1]) // size]
        for r in range(rounds - 1):
            rows = order[..., r, :]
            np.put_along_axis(met[..., r], rows, np.broadcast_to(of_place, rows.shape), axis=-1)
    found = []
    for r in range(rounds):
        given = (q, k, v, start, stop, blocks, None, avoid, met_q, met_k, None, None, mask)
        orders = {"order_q": order_q[..., r, :], "order_k": order_k[..., r, :]}
        values, batch, tasks, products = record(given, static, orders)
        found.append((values | {"rounds": r}, batch, tasks, products))
    return found
