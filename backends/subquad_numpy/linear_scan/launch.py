"""The linear scan and its gradient as launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.core.dtypes import cast
from subquad_numpy.linear_scan.calls import SMALL, SMALL_GRADIENT, cut_work
from subquad_numpy.runtime.arguments import Fields
from subquad_numpy.runtime.launch import Launch, Run


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The output of the kernel `linear_scan`, by one launch."""
    from subquad_numpy.linear_scan.kernel import SCAN_RECORD, linear_scan_kernel

    a, b, initial_state, resets = arrays
    xp = array_namespace(b)
    operands = {"a": cast(xp, a, b.dtype), "b": b, "initial_state": cast(xp, initial_state, b.dtype), "resets": resets}
    results = {"h": Like(b.shape, b.dtype)}
    return (run(_launch(linear_scan_kernel, SCAN_RECORD, b, static, results, SMALL), operands)["h"],)


def launch_backward(
    arrays: Sequence[Any],
    static: Mapping[str, Any],
    outputs: Sequence[Array],
    grads: Sequence[Array],
    run: Run,
) -> tuple[Array | None, ...]:
    """The gradients by a, b and the initial state, by one launch; b itself is not read."""
    from subquad_numpy.linear_scan.kernel import GRADIENT_RECORD, linear_scan_gradient_kernel

    (a, _, initial_state, resets), (h,), (grad_h,) = arrays, outputs, grads
    xp = array_namespace(h)
    operands = {
        "a": cast(xp, a, h.dtype),
        "h": h,
        "initial_state": cast(xp, initial_state, h.dtype),
        "resets": resets,
        "grad_h": cast(xp, grad_h, h.dtype),
    }
    results = {name: Like(h.shape, h.dtype) for name in ("grad_a", "grad_b")}
    results["grad_initial_state"] = Like((h.shape[0], h.shape[2]), h.dtype)
    found = run(_launch(linear_scan_gradient_kernel, GRADIENT_RECORD, h, static, results, SMALL_GRADIENT), operands)
    by_state = None if initial_state is None else cast(xp, found["grad_initial_state"], initial_state.dtype)
    return cast(xp, found["grad_a"], a.dtype), found["grad_b"], by_state, None


def _launch(
    compile: Any,  # noqa: A002
    record: Fields,
    like: Array,
    static: Mapping[str, Any],
    results: dict[str, Like],
    small: int,
) -> Launch:
    dtype = np.dtype(like.dtype)
    sizes, tasks, threads = cut_work(like.shape, dtype, static["reverse"], small=small)
    return Launch(compile, (dtype.name,), record, results, sizes, tasks=tasks, threads=threads)
