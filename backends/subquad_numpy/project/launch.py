"""The product as a launch; its gradient consists of the library's own products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.core.dtypes import cast, compute_dtype
from subquad.kernels.project import weight_blocks
from subquad_numpy.project.calls import SMALL, sizes_of, stored_as, tasks_of
from subquad_numpy.runtime.launch import Launch, Run


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array]:
    """The output of the kernel `project`, by one launch."""
    from subquad_numpy.project.kernel import RECORD, project_kernel
    from subquad_numpy.runtime.threads import thread_count

    x, W, bias = arrays
    xp = array_namespace(x)
    dtype = compute_dtype(xp, x)
    x, bias = xp.astype(x, dtype, copy=False), cast(xp, bias, dtype)
    threads = 1 if W.shape[0] * W.shape[1] < SMALL else thread_count()
    made = Launch(
        project_kernel, (np.dtype(dtype).name, stored_as(W)), RECORD, {"y": Like((x.shape[0], W.shape[0]), dtype)},
        sizes_of(x, W), tasks=tasks_of(W), threads=threads,
    )  # fmt: skip
    return (run(made, {"x": x, "W": W, "bias": bias})["y"],)


def launch_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], outputs: Sequence[Array], grads: Sequence[Array], run: Run
) -> tuple[Array | None, ...]:
    """The gradients by all inputs, in their dtypes."""
    (x, W, bias), (by,) = arrays, grads
    xp = array_namespace(x)
    grad_x: Any = sum(by[:, start:stop] @ cast(xp, W[start:stop, :], by.dtype) for start, stop in weight_blocks(W))
    grad_W = xp.matrix_transpose(by) @ cast(xp, x, by.dtype)
    grad_bias = None if bias is None else cast(xp, xp.sum(by, axis=0), bias.dtype)
    return cast(xp, grad_x, x.dtype), cast(xp, grad_W, W.dtype), grad_bias
