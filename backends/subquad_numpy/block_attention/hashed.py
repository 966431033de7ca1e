"""The compiled attention of rows and keys that meet in rounds, on NumPy arrays, and its gradient.

Each round is one run of the kernels of block attention, which read rows by their order and join the output of the
rounds before in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.kernels.hashed_attention import key_chunks
from subquad_numpy.block_attention.calls import Record, gradients, record
from subquad_numpy.runtime.arguments import run

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
        run(kernel, FORWARD_RECORD, batch, tasks, products, threads, **values, **before, out=out, lse=lse)
    return (out, lse), None


def hashed_attention_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: Any = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients by q, k and v, with the batch axes of the call."""
    return *gradients(_rounds(arrays, static), outputs, grads, threads), *[None] * (len(arrays) - 3)


def _rounds(arrays: Sequence[Any], static: Mapping[str, Any]) -> list[Record]:
    """The record of each round."""
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
