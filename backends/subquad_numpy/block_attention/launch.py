"""Block attention and its gradient as launches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.core.dtypes import cast
from subquad.core.shapes import broadcast_batch
from subquad.kernels.block_attention import outputs as outputs_of
from subquad.kernels.hashed_attention import key_chunks, key_chunks_met
from subquad.kernels.hashed_attention import outputs as hashed_outputs_of
from subquad.kernels.sampled_attention import outputs as sampled_outputs_of
from subquad_numpy.block_attention.calls import (
    INTEGERS,
    NO_ORDERS,
    WRITTEN,
    as_block_attention,
    cut_work,
    names_of,
    parts_of,
    with_many_rows,
)
from subquad_numpy.runtime.launch import Launch, Run, threads_for, to_shape
from subquad_numpy.runtime.stored import stored_word, widest


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `block_attention`, by one launch.

    With `segments`, an option of `landmark_attention`, also the means of so many segments of the keys, of which each
    interval has whole ones.
    """
    options = {name: static[name] for name in ("scale", "size", "wide") if name in static}
    return _launch(arrays, static, outputs_of(*arrays[:-1], key_mask=arrays[-1], **options), run)


def launch_sampled(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `sampled_attention`, by one launch."""
    likes = sampled_outputs_of(*arrays[:-1], key_mask=arrays[-1], scale=static["scale"], every=1)
    out, lse, effective, mean = _launch(*as_block_attention(arrays, static), likes, run)
    return out, lse, effective[..., :: static["every"]], mean


def _launch(arrays: Sequence[Any], static: Mapping[str, Any], likes: tuple[Like, ...], run: Run) -> tuple[Array, ...]:
    from subquad_numpy.block_attention.forward import FORWARD_RECORD, block_attention_kernel

    sizes, tasks, products = cut_work(arrays, static)
    out, lse = likes[:2]
    sizes["stored"] = stored_word((*arrays[:3], out))
    batch, results = tuple(lse.shape[:-1]), dict(zip(WRITTEN, likes, strict=False))
    sizes, tasks = with_many_rows(sizes, tasks, batch, static)
    sizes["items"] = math.prod(batch) if static.get("sampled", False) else 0
    if "segments" in static:
        sizes["segments"] = static["segments"]
        own = broadcast_batch(**{name: x.shape[:-2] for name, x in zip("qkv", arrays[:3], strict=True)})
        results["key_means"] = Like((*own, sizes["segments"], sizes["d"]), lse.dtype)
    made = Launch(
        block_attention_kernel, (np.dtype(lse.dtype),), FORWARD_RECORD, results, sizes, batch, tasks,
        threads_for(int(math.prod(batch) * products)), zeros=frozenset({"key_means"}),
    )  # fmt: skip
    found = run(made, _operands(array_namespace(arrays[0]), arrays, static))
    return tuple(found[name] for name in results)


def launch_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], outputs: Sequence[Array], grads: Sequence[Array], run: Run,
    orders: Mapping[str, Array] = NO_ORDERS, rounds: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients by q, k and v, by one launch; with orders and a number of rounds, those of one round."""
    from subquad_numpy.block_attention.backward import BACKWARD_RECORD, block_attention_gradient_kernel

    (q, k, v), (out, lse), xp = arrays[:3], outputs, array_namespace(arrays[0])
    sizes, tiles, products = cut_work(arrays, static)
    sizes["stored"] = stored_word((q, k, v, out, grads[0]))
    batch, dtype = tuple(lse.shape[:-1]), lse.dtype
    items = math.prod(batch)
    threads = threads_for(int(3 * items * products))
    parts = parts_of(items, tiles, threads)
    n_kv, d, d_v = k.shape[-2], k.shape[-1], v.shape[-1]
    results = {
        "grad_q": Like((*batch, q.shape[-2], d), dtype),
        "grad_k": Like((parts, *batch, n_kv, d), dtype),
        "grad_v": Like((parts, *batch, n_kv, d_v), dtype),
    }
    sizes |= {} if rounds is None else {"rounds": rounds}
    sizes |= {"parts": parts, "k_step": items * n_kv * d, "v_step": items * n_kv * d_v}
    made = Launch(
        block_attention_gradient_kernel, (np.dtype(dtype),), BACKWARD_RECORD, results, sizes, batch, parts, threads,
        zeros=frozenset(results),
    )  # fmt: skip
    given = {"out": out, "lse": lse, "grad_out": grads[0], "grad_lse": grads[1]}
    found = run(made, {**_operands(xp, arrays, static), **orders, **given})
    by = found["grad_q"], xp.sum(found["grad_k"], axis=0), xp.sum(found["grad_v"], axis=0)
    pairs = zip(by, (q, k, v), strict=True)
    summed = [cast(xp, to_shape(xp, grad, tuple(x.shape)), x.dtype) for grad, x in pairs]
    return *summed, *[None] * (len(arrays) - 3)


def _operands(xp: ModuleType, arrays: Sequence[Any], static: Mapping[str, Any]) -> dict[str, Array | None]:
    given = dict(zip(names_of(arrays), arrays, strict=True))
    numbers = xp.asarray(np.array([static["scale"]], widest(*arrays[:3])))
    return {
        "numbers": numbers,
        **{name: given[name] for name in ("q", "k", "v", "mask")},
        **{name: cast(xp, given[name], xp.int32) for name in INTEGERS if name in given},
    }


def launch_hashed(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `hashed_attention`, by one launch for each round."""
    from subquad_numpy.block_attention.forward import FORWARD_RECORD, block_attention_kernel

    out, lse = hashed_outputs_of(*arrays[:-1], key_mask=arrays[-1], **static)
    batch, xp, last = tuple(lse.shape[:-1]), array_namespace(arrays[0]), arrays[6].shape[-2] - 1
    found: dict[str, Array] = {}
    for given, orders, r in _rounds(xp, arrays, static):
        sizes, tasks, products = cut_work(given, static)
        # an output of half precision is rounded once: rounds before the last leave what is computed
        own = out if r == last else Like(out.shape, lse.dtype)
        reused = {"lse": "before_lse"} | ({"out": "before_out"} if own.dtype == lse.dtype else {})
        made = Launch(
            block_attention_kernel, (np.dtype(lse.dtype),), FORWARD_RECORD, {"out": own, "lse": lse},
            sizes | {"rounds": r, "stored": stored_word((*arrays[:3], own))}, batch, tasks,
            threads_for(int(math.prod(batch) * products)), reused=reused,
        )  # fmt: skip
        before = {f"before_{name}": x for name, x in found.items()}
        found = run(made, _operands(xp, given, static) | orders | before)
    return found["out"], found["lse"]


def launch_hashed_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], outputs: Sequence[Array], grads: Sequence[Array], run: Run
) -> tuple[Array | None, ...]:
    """The gradients of `hashed_attention` by q, k and v, by one launch for each round."""
    xp = array_namespace(arrays[0])
    total: Any = None
    for given, orders, r in _rounds(xp, arrays, static):
        found = launch_backward(given, static, outputs, grads, run, orders, r)[:3]
        total = found if total is None else [x + y for x, y in zip(total, found, strict=True)]
    return *total, *[None] * (len(arrays) - 3)


def _rounds(xp: ModuleType, arrays: Sequence[Any], static: Mapping[str, Any]) -> Iterator[tuple[Any, Any, int]]:
    """(arrays of the kernel `block_attention`, orders, number) of each round."""
    q, k, v, start, stop, avoid, order_q, order_k, chunk_q, chunk_k, mask = arrays
    size = static["size"]
    own = key_chunks(xp, q.shape[-2], k.shape[-2], size, q)
    blocks = xp.stack([own - 1, own], axis=-1)
    met_q = key_chunks_met(xp, chunk_q, own, k.shape[-2], size)
    given = (q, k, v, start, stop, blocks, None, avoid, met_q, chunk_k, None, None, mask)
    for r in range(order_q.shape[-2]):
        yield given, {"order_q": order_q[..., r, :], "order_k": order_k[..., r, :]}, r
