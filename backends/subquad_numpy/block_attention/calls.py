"""The compiled block attention on NumPy arrays, and its gradient, as `subquad_numpy.compiled.Compiled` asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from subquad_numpy.runtime.arguments import (
    Constant,
    Fix,
    Forms,
    Run,
    fix_items,
    fix_rows,
    fixed,
    row_step,
    run,
    straight,
)
from subquad_numpy.runtime.stored import common, stored_word, widest
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]
NAMES = "q", "k", "v", "start", "stop", "blocks", "place", "avoid", "met_q", "met_k", "pairs", "bias", "mask"
INTEGERS = {"start": 1, "stop": 1, "blocks": 2, "place": 1, "avoid": 1, "met_q": 2, "met_k": 2}
INTEGERS |= {"order_q": 1, "order_k": 1, "picks": 1}  # of the rounds of `hashed_attention`, and of sampled rows
# fields of the argument record, batch, tiles of rows of an item, multiply-adds of an item
Record = tuple[dict[str, Any], tuple[int, ...], int, float]
WRITTEN = "out", "lse", "effective", "mean"  # the last fields of the record
MANY_TILES = 32  # of a call, which so occupy all threads
NO_LIST = (None,) * 7  # of blocks, places, meetings and masks
NO_ORDERS: Mapping[str, Array] = {}


def _plan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The output, of `out_dtype` if that is given, and the log-sum-exp of the kernel `block_attention`.

    The latter is None unless `needs_lse`, an option of other kernels, as `out_dtype`, `from_first` and `sampled` are:
    with that, the outputs of `sampled_attention`. `from_first`: all rows see the first key.
    """
    from subquad_numpy.block_attention.forward import FORWARD_RECORD, block_attention_kernel

    values, batch, tasks, products = record(arrays, static)
    values, tasks = with_many_rows(values, tasks, batch, static)
    shape, dtype = (*batch, values["n"], values["d_v"]), widest(*arrays[:3])
    of_rows = dtype if static.get("wide", False) else static.get("out_dtype", common(*arrays[:3]))
    kinds: list[Any] = [(shape, of_rows), (shape[:-1], dtype)]
    kinds[1] = kinds[1] if static.get("needs_lse", True) else None
    kinds += [(shape[:-1], dtype), (shape, dtype)] if static.get("sampled", False) else []
    written = {name: kind for name, kind in zip(WRITTEN, kinds, strict=False) if kind is not None}
    values |= {name: np.empty(*kind) for name, kind in written.items()}
    values["stored"] = stored_word((*arrays[:3], values["out"]))
    values["items"] = math.prod(batch) if static.get("sampled", False) else 0
    names = names_of(arrays)
    given = [name for name, x in zip(names, arrays, strict=True) if x is not None and name in FORWARD_RECORD]
    chosen = itemgetter(*map(names.index, given))
    planned = Run(block_attention_kernel(dtype), FORWARD_RECORD, batch, tasks, products, values, (*given, *written))
    fixes = [None if x is None else fix_of(name, x) for name, x in zip(names, arrays, strict=True)]
    must_fix, has_lse = any(fix is not None for fix in fixes), "lse" in written

    def block_attention(
        arrays: Sequence[Any], new: Callable[..., Array], threads: Any
    ) -> tuple[tuple[Array | None, ...], None]:
        outs = [new(*kind) for kind in written.values()]
        if must_fix:
            arrays = [x if x is None else fixed(fix, x) for fix, x in zip(fixes, arrays, strict=True)]
        planned((*chosen(arrays), *outs), threads)
        return tuple(outs) if has_lse else (outs[0], None, *outs[1:]), None

    return block_attention if must_fix else straight(block_attention)


block_attention = Forms(_plan)


def _plan_sampled(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The outputs of the kernel `sampled_attention`."""
    planned, every = block_attention.planned(*as_block_attention(arrays, static), save), static["every"]

    def sampled_attention(
        arrays: Sequence[Any], new: Callable[..., Array], threads: Any
    ) -> tuple[tuple[Array, ...], None]:
        *rows, numbers, key_mask = arrays
        (out, lse, effective, mean), _ = planned((*rows, *NO_LIST, key_mask, numbers), new, threads)
        return (out, lse, effective[..., ::every], mean), None

    return straight(sampled_attention) if getattr(planned, "is_straight", False) else sampled_attention


sampled_attention = Forms(_plan_sampled)


def as_block_attention(arrays: Sequence[Any], static: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arrays `names_of` and options of `block_attention` for those of `sampled_attention`, with the mask last."""
    *rows, numbers, key_mask = arrays
    options = {"scale": static["scale"], "size": 1, "sampled": True, "wide": True}
    return (*rows, *NO_LIST, key_mask, numbers), options


def names_of(arrays: Sequence[Any]) -> tuple[str, ...]:
    """The fields of arrays: `NAMES`, and for sampled rows which ones of q they are."""
    return (*NAMES, "picks")[: len(arrays)]


def block_attention_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: Any = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients by q, k and v, with the batch axes of the call."""
    return *gradients([record(arrays, static)], outputs, grads, threads), *[None] * (len(arrays) - 3)


def gradients(
    rounds: Sequence[Record], outputs: Sequence[Array], grads: Sequence[Array | None], threads: Any
) -> tuple[Array, Array, Array]:
    """The gradients by q, k and v of outputs over the keys of all rounds, added up round by round."""
    from subquad_numpy.block_attention.backward import BACKWARD_RECORD, block_attention_gradient_kernel

    values, batch, tiles, _ = rounds[0]
    (out, lse), (grad_out, grad_lse) = outputs, grads
    (n, d), (n_kv, d_v), dtype, items = values["q"].shape[-2:], values["v"].shape[-2:], lse.dtype, math.prod(batch)
    count = thread_count(threads)
    parts = parts_of(items, tiles, count)
    by_q, by_k, by_v = (
        np.zeros(shape, dtype) for shape in ((*batch, n, d), (parts, *batch, n_kv, d), (parts, *batch, n_kv, d_v))
    )
    if 0 not in (*batch, n, n_kv, d_v):
        shared = {
            "out": np.ascontiguousarray(out), "lse": np.ascontiguousarray(lse),
            "grad_out": np.zeros(out.shape, dtype) if grad_out is None else np.ascontiguousarray(grad_out),
            "grad_lse": None if grad_lse is None else np.ascontiguousarray(grad_lse, dtype),
            "grad_q": by_q, "grad_k": by_k[0], "grad_v": by_v[0],
            "parts": parts, "k_step": items * n_kv * d, "v_step": items * n_kv * d_v,
        }  # fmt: skip
        arrays = (*(values[name] for name in ("q", "k", "v")), out, shared["grad_out"])
        shared["stored"] = stored_word(arrays)
        kernel = block_attention_gradient_kernel(dtype)
        for values, _, _, products in rounds:
            run(kernel, BACKWARD_RECORD, batch, parts, 3 * products, threads, **values, **shared)
    if parts == 1:
        return by_q, by_k[0], by_v[0]
    return by_q, by_k.sum(axis=0), by_v.sum(axis=0)


def parts_of(items: int, tiles: int, threads: int) -> int:
    """Into how many sums the gradients by the keys of an item are split, so that every thread has work."""
    return 1 if items >= 2 * threads else max(1, min(threads, tiles))


def cut_work(arrays: Sequence[Any], static: Mapping[str, Any]) -> tuple[dict[str, int], int, float]:
    """(numbers of the argument record for contiguous rows, tasks of an item, multiply-adds of an item)."""
    from subquad_numpy.block_attention.tiles import ROWS

    given = dict(zip(names_of(arrays), arrays, strict=True))
    (n, d), (n_kv, d_v), size = given["q"].shape[-2:], given["v"].shape[-2:], static["size"]
    blocks, met, picks = given["blocks"], given["met_q"], given.get("picks")
    n = n if picks is None else picks.shape[-1]
    listed = 0 if blocks is None else blocks.shape[-1]
    tasks = -(-n // ROWS) if blocks is None else blocks.shape[-2] * -(-size // ROWS)
    sizes = {
        "n": n, "n_kv": n_kv, "d": d, "d_v": d_v, "size": size, "rows": ROWS, "listed": listed, "tiles": tasks,
        "items": 0, "rounds": 0 if met is None else met.shape[-1], "met_row": 0 if met is None else met.shape[-1],
        "q_row": d, "k_row": d, "v_row": d_v,
    }  # fmt: skip
    return sizes, tasks, n * (d + d_v) * float(min(listed * size, n_kv) if listed else n_kv)


def with_many_rows(
    sizes: dict[str, Any], tasks: int, batch: tuple[int, ...], static: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """The sizes and tasks of a forward pass by tiles of many rows, if all rows see the first key and many tiles remain.

    Keys and values that have half precision are widened for a tile, and so less often. No number depends on it, since
    tiles of keys begin at the first one.
    """
    from subquad_numpy.block_attention.tiles import MANY_ROWS

    many = -(-sizes["n"] // MANY_ROWS)
    if not static.get("from_first", False) or many * math.prod(batch) < MANY_TILES:
        return sizes, tasks
    return sizes | {"rows": MANY_ROWS, "tiles": many}, many


def _axes(name: str) -> int:
    """How many of the last axes of an array belong to one item."""
    return INTEGERS.get(name, 1 if name == "mask" else 2)


def fix_of(name: str, x: Array) -> Fix:
    """The copy after which a kernel can read arrays like x; None if none is needed."""
    if name in INTEGERS and x.dtype != np.int32:
        return partial(np.ascontiguousarray, dtype=np.int32)
    return fix_rows(x) if name in ("q", "k", "v") else fix_items(x, _axes(name))


def record(arrays: Sequence[Any], static: Mapping[str, Any], orders: Mapping[str, Array] = NO_ORDERS) -> Record:
    """The record of a run on these arrays."""
    sizes, tasks, products = cut_work(arrays, static)
    given = {name: x for name, x in zip(names_of(arrays), arrays, strict=True) if x is not None} | dict(orders)
    values: dict[str, Any] = {**sizes, **{name: fixed(fix_of(name, x), x) for name, x in given.items()}}
    values |= {f"{name}_row": row_step(values[name]) for name in ("q", "k", "v")}
    values["numbers"] = Constant(np.array([static["scale"]], widest(*arrays[:3])))
    batch = np.broadcast_shapes(*(x.shape[: x.ndim - _axes(name)] for name, x in given.items()))
    return values, batch, tasks, products
