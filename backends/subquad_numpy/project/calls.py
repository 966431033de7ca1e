"""The compiled product on NumPy arrays, and its gradient, as `subquad_numpy.compiled.Compiled` describes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.kernels.project import weight_blocks
from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fixed

Array = np.ndarray[Any, Any]
MOST_ROWS = 32  # with more, the products of some libraries are faster
BLOCK = 32  # outputs of a task
SMALL = 1 << 18  # weights of a call, about 20 µs: below that, waking a second thread costs more than it saves
HALF = ("float16", "bfloat16", "uint16")


def _plan_project(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`project`, whose weights are read as they are stored."""
    x, W, bias = arrays
    dtype, shape = np.dtype(np.float32 if x.dtype.name in HALF else x.dtype), (x.shape[0], W.shape[0])
    casts = [a is not None and a.dtype != dtype for a in (x, bias)]
    fix_x, fix_W, fix_bias = (None if a is None else fix_items(a, a.ndim) for a in arrays)
    is_small, is_plain = W.size < SMALL, not (any(casts) or fix_x or fix_W or fix_bias)
    runs: list[Run] = []

    def project(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array], None]:
        y = new(shape, dtype)
        if not runs:
            from subquad_numpy.project.kernel import RECORD, project_kernel

            sizes = sizes_of(x, W)
            runs.append(Run(project_kernel(dtype.name, stored_as(W)), RECORD, (), tasks_of(W), math.inf, sizes))
        if not is_plain:
            x_, W_, bias_ = arrays
            x_, bias_ = (widened(a, dtype) if cast else a for a, cast in zip((x_, bias_), casts, strict=True))
            arrays = fixed(fix_x, x_), fixed(fix_W, W_), bias_ if bias_ is None else fixed(fix_bias, bias_)
        runs[0]((*arrays, y), 1 if is_small else threads)
        return (y,), None

    return project


project = Forms(_plan_project)


def project_backward(
    arrays: Sequence[Array | None], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """∂x = ∂y W, ∂W = ∂yᵀ x, ∂bias = Σ ∂y, the products by the BLAS of NumPy."""
    x, W, bias = arrays
    assert x is not None
    assert W is not None
    (by,) = grads
    if by is None:
        return None, None, None
    grad_x = np.zeros(x.shape, by.dtype) if need[0] else None
    if grad_x is not None:
        for start, stop in weight_blocks(W):
            grad_x += by[:, start:stop] @ widened(W[start:stop], by.dtype)
    grad_W = by.T @ widened(x, by.dtype) if need[1] else None
    return grad_x, grad_W, None if bias is None or not need[2] else by.sum(axis=0)


def widened(x: Array, dtype: Any) -> Array:
    """The numbers of x in `dtype`; uint16 stands for the bits of bfloat16, where NumPy has no such dtype."""
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(dtype, copy=False)


def stored_as(W: Any) -> str:
    """The name of the dtype of weights."""
    name = np.dtype(W.dtype).name
    return "bfloat16" if name == "uint16" else name


def sizes_of(x: Any, W: Any) -> dict[str, int]:
    """The numbers of an argument record."""
    return {"rows": x.shape[0], "inputs": W.shape[1], "outputs": W.shape[0], "block": BLOCK}


def tasks_of(W: Any) -> int:
    """The number of tasks of a call."""
    return -(-W.shape[0] // BLOCK)
