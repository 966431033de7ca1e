"""The compiled attention of rows and keys that meet in rounds, on NumPy arrays, and its gradient.

Each round is one run of the kernels of block attention, which read rows by their order and join the output of the
rounds before in place. Items are computed a few at a time, all rounds of one while its rows are in cache. An output of
half precision is rounded once: rounds before the last one leave float32, whose upper halves are in the output, and the
lower ones, of these items alone, beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.kernels.hashed_attention import key_chunks, key_chunks_met
from subquad_numpy.block_attention.calls import Record, fix_of, gradients, record
from subquad_numpy.runtime.arguments import Forms, Run, fixed
from subquad_numpy.runtime.stored import common, stored_word, widest
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]
AT_ONCE = 2**16  # numbers of the outputs that are computed together, for each thread; or those of one item
# the arrays of the kernel, by the fields of records; orders of all rounds have one axis more than a record has
INPUTS = "q", "k", "v", "start", "stop", "avoid", "order_q", "order_k", "met_q", "met_k", "mask"
AXES = 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 1  # of each that belong to one item


def _plan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The output and the log-sum-exp of the kernel `hashed_attention`."""
    if arrays[6].shape[-2] > 1:
        present = [(x, axes) for x, axes in zip(arrays, AXES, strict=True) if x is not None]
        batch = np.broadcast_shapes(*(x.shape[: x.ndim - axes] for x, axes in present))
        if len(items_at_once(batch, arrays[0].shape[-2] * arrays[2].shape[-1], 1)) > 1:
            return _in_parts(arrays, static, batch)
    return _plan_whole(arrays, static, save)


def _plan_whole(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The outputs of `hashed_attention`, those of all items round by round."""
    from subquad_numpy.block_attention.forward import FORWARD_RECORD, block_attention_kernel

    fixes = [None if x is None else fix_of(name, x) for name, x in zip(INPUTS, arrays, strict=True)]
    rounds = _rounds([x if x is None else fixed(fix, x) for fix, x in zip(fixes, arrays, strict=True)], static)
    (n, d_v), dtype, batch = (arrays[0].shape[-2], arrays[2].shape[-1]), widest(*arrays[:3]), rounds[0][1]
    out_dtype, kernel, runs = common(*arrays[:3]), block_attention_kernel(dtype), list[Run]()
    shape, before = (*batch, n, d_v), dict[str, Array]()
    out, lse = np.empty(shape, out_dtype), np.empty(shape[:-1], dtype)  # memory of examples is not touched
    has_halves = out_dtype != dtype and len(rounds) > 1
    halves = {"halves": np.empty(shape, np.uint16)} if has_halves else {}
    stored = {"stored": stored_word((*arrays[:3], out))}
    for values, _, tasks, products in rounds:
        keeps = {"keeps": int(has_halves and len(runs) < len(rounds) - 1)}
        given = values | before | stored | keeps | halves | {"out": out, "lse": lse}
        runs.append(Run(kernel, FORWARD_RECORD, batch, tasks, products, given))
        before = {"before_out": out, "before_lse": lse}
    names = [name for name, axes in FORWARD_RECORD.items() if axes is not None]
    kept = {"blocks": rounds[0][0]["blocks"]}
    n_kv, size = arrays[1].shape[-2], static["size"]
    own = key_chunks(np, n, n_kv, size, arrays[0])  # type: ignore[arg-type]

    def hashed_attention(
        arrays: Sequence[Any], new: Callable[..., Array], threads: Any
    ) -> tuple[tuple[Array, Array], None]:
        out, lse = new(shape, out_dtype), new(shape[:-1], dtype)
        given: dict[str, Any] = {
            name: x if x is None else fixed(fix, x) for name, fix, x in zip(INPUTS, fixes, arrays, strict=True)
        }
        order_q, order_k = given["order_q"], given["order_k"]
        given |= kept | {"out": out, "lse": lse, "halves": np.empty(shape, np.uint16) if has_halves else None}
        given["met_q"] = key_chunks_met(np, given["met_q"], own, n_kv, size)  # type: ignore[arg-type]
        for r, planned in enumerate(runs):
            given |= {"order_q": order_q[..., r, :], "order_k": order_k[..., r, :]}
            planned([given.get(name) for name in names], threads)
            given |= {"before_out": out, "before_lse": lse}
        return (out, lse), None

    return hashed_attention


hashed_attention, _whole = Forms(_plan), Forms(_plan_whole)


def _in_parts(arrays: Sequence[Any], static: Mapping[str, Any], batch: tuple[int, ...]) -> Callable[..., Any]:
    """The outputs of `hashed_attention`, those of some items after the others."""
    shape, kinds = (*batch, arrays[0].shape[-2], arrays[2].shape[-1]), (common(*arrays[:3]), widest(*arrays[:3]))

    def in_parts(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, Array], None]:
        out, lse = new(shape, kinds[0]), new(shape[:-1], kinds[1])
        for items in items_at_once(batch, math.prod(shape[-2:]), thread_count(threads)):
            given = [x if x is None else _items_of(x, axes, batch, items) for x, axes in zip(arrays, AXES, strict=True)]
            own = iter((out[items], lse[items]))
            _whole(given, static, new=lambda *_, own=own: next(own), threads=threads)
        return (out, lse), None

    return in_parts


def items_at_once(batch: tuple[int, ...], size: int, threads: int) -> list[tuple[slice, ...]]:
    """The items of a batch in parts that lie side by side, so many numbers in each item."""
    count, axis = max(1, AT_ONCE * threads // max(size, 1)), len(batch)
    while axis > 0 and math.prod(batch[axis - 1 :]) <= count:
        axis -= 1
    if axis == 0 or 0 in batch:
        return [()]
    length = batch[axis - 1]
    together = max(1, count // math.prod(batch[axis:]))
    parts = [[slice(i, i + 1) for i in range(other)] for other in batch[: axis - 1]]
    parts.append([slice(i, min(i + together, length)) for i in range(0, length, together)])
    return list(itertools.product(*parts))


def _items_of(x: Array, axes: int, batch: tuple[int, ...], items: tuple[slice, ...]) -> Array:
    """What these items of the batch read of an array, of whose axes the last ones belong to one item."""
    own = x.shape[: x.ndim - axes]
    names = (*items, *[slice(None)] * (len(batch) - len(items)))[len(batch) - len(own) :]
    return x[tuple(slice(None) if size == 1 else some for size, some in zip(own, names, strict=True))]


def hashed_attention_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: Any = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients by q, k and v, with the batch axes of the call."""
    return *gradients(_rounds(arrays, static), outputs, grads, threads), *[None] * (len(arrays) - 3)


def _rounds(arrays: Sequence[Any], static: Mapping[str, Any]) -> list[Record]:
    """The record of each round."""
    q, k, v, start, stop, avoid, order_q, order_k, chunk_q, chunk_k, mask = arrays
    n, n_kv, size, rounds = q.shape[-2], k.shape[-2], static["size"], order_q.shape[-2]
    own = key_chunks(np, n, n_kv, size, q)  # type: ignore[arg-type]
    blocks = np.stack([own - 1, own], axis=-1)
    met_q = key_chunks_met(np, chunk_q, own, n_kv, size)  # type: ignore[arg-type]
    found = []
    for r in range(rounds):
        given = (q, k, v, start, stop, blocks, None, avoid, met_q, chunk_k, None, None, mask)
        orders = {"order_q": order_q[..., r, :], "order_k": order_k[..., r, :]}
        values, batch, tasks, products = record(given, static, orders)
        found.append((values | {"rounds": r}, batch, tasks, products))
    return found
