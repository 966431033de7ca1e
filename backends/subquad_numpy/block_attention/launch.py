"""Block attention and its gradient as launches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.core.dtypes import cast
from subquad.kernels.block_attention import outputs as outputs_of
from subquad_numpy.block_attention.calls import INTEGERS, NAMES, cut_work, parts_of
from subquad_numpy.runtime.launch import Launch, Run, threads_for


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `block_attention`, by one launch."""
    from subquad_numpy.block_attention.forward import FORWARD_RECORD, block_attention_kernel

    q = arrays[0]
    out, lse = outputs_of(*arrays[:-1], key_mask=arrays[-1], **static)
    sizes, tasks, products = cut_work(arrays, static)
    batch = tuple(lse.shape[:-1])
    made = Launch(
        block_attention_kernel, (np.dtype(q.dtype),), FORWARD_RECORD, {"out": out, "lse": lse}, sizes, batch, tasks,
        threads_for(int(math.prod(batch) * products)),
    )  # fmt: skip
    found = run(made, _operands(array_namespace(q), arrays, static))
    return found["out"], found["lse"]


def launch_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], outputs: Sequence[Array], grads: Sequence[Array], run: Run
) -> tuple[Array | None, ...]:
    """The gradients by q, k and v, by one launch."""
    from subquad_numpy.block_attention.backward import BACKWARD_RECORD, block_attention_gradient_kernel

    (q, k, v), (out, lse), xp = arrays[:3], outputs, array_namespace(arrays[0])
    sizes, tiles, products = cut_work(arrays, static)
    batch, dtype = tuple(lse.shape[:-1]), q.dtype
    items = math.prod(batch)
    threads = threads_for(int(3 * items * products))
    parts = parts_of(items, tiles, threads)
    n_kv, d, d_v = k.shape[-2], k.shape[-1], v.shape[-1]
    results = {
        "grad_q": Like((*batch, q.shape[-2], d), dtype),
        "grad_k": Like((parts, *batch, n_kv, d), dtype),
        "grad_v": Like((parts, *batch, n_kv, d_v), dtype),
    }
    sizes |= {"tiles": tiles, "parts": parts, "k_step": items * n_kv * d, "v_step": items * n_kv * d_v}
    made = Launch(
        block_attention_gradient_kernel, (np.dtype(dtype),), BACKWARD_RECORD, results, sizes, batch, parts, threads,
        zeros=frozenset(results),
    )  # fmt: skip
    given = {"out": out, "lse": lse, "grad_out": grads[0], "grad_lse": grads[1]}
    found = run(made, _operands(xp, arrays, static) | {name: cast(xp, x, dtype) for name, x in given.items()})
    by = found["grad_q"], xp.sum(found["grad_k"], axis=0), xp.sum(found["grad_v"], axis=0)
    summed = [_to_shape(xp, grad, tuple(x.shape)) for grad, x in zip(by, (q, k, v), strict=True)]
    return *summed, *[None] * (len(arrays) - 3)


def _operands(xp: ModuleType, arrays: Sequence[Any], static: Mapping[str, Any]) -> dict[str, Array | None]:
    given = dict(zip(NAMES, arrays, strict=True))
    numbers = xp.asarray(np.array([static["scale"]]), dtype=given["q"].dtype)
    return {
        "numbers": numbers,
        **{name: given[name] for name in ("q", "k", "v", "mask")},
        **{name: cast(xp, given[name], xp.int32) for name in INTEGERS},
    }


def _to_shape(xp: ModuleType, grad: Array, shape: tuple[int, ...]) -> Array:
    """A gradient added up over the batch axes that an array of this shape lacks or has once."""
    lacking = grad.ndim - len(shape)
    axes = (
        *range(lacking),
        *(i + lacking for i, size in enumerate(shape) if size == 1 and grad.shape[i + lacking] != 1),
    )
    return xp.reshape(xp.sum(grad, axis=axes), shape) if axes else grad
