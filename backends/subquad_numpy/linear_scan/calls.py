"""The compiled linear scan on NumPy arrays, and its gradient, as `subquad_numpy.compiled.Compiled` describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.backend import Like
from subquad_numpy.runtime.arguments import record_of
from subquad_numpy.runtime.launch import Launch
from subquad_numpy.runtime.threads import run_tasks, thread_count

Array = np.ndarray[Any, Any]
SMALL = 1 << 16  # elements, some 30 µs: less than handing work to a thread is worth
FORWARD, GRADIENT = ("a", "b", "initial_state"), ("a", "b", "initial_state", "h", "grad_h")


def scan(
    arrays: Sequence[Array | None], static: Mapping[str, Any], *, new: Callable[..., Array] = np.empty,
    save: bool = False, threads: int | None = None,
) -> tuple[tuple[Array], None]:  # fmt: skip
    """`linear_scan`: h[t] = a[t] h[t−1] + b[t] along the second axis."""
    _, b, _ = arrays
    assert b is not None
    h = new(b.shape, b.dtype)
    if h.size:
        _run(launch(arrays, static, threads=threads), arrays, {"h": h})
    return (h,), None


def scan_backward(
    arrays: Sequence[Array | None], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...] | None:  # fmt: skip
    """Gradients of `scan`: ∂/∂Re + i ∂/∂Im of the real loss."""
    if grads[0] is None:
        return None
    plan = launch_backward(arrays, static, threads=threads)
    found = {name: np.zeros(like.shape, like.dtype) for name, like in plan.outputs.items()}
    if outputs[0].size:
        _run(plan, (*arrays, outputs[0], grads[0]), found)
    return found["grad_a"], found["grad_b"], None if arrays[2] is None else found["grad_initial_state"]


def launch(likes: Sequence[Any], static: Mapping[str, Any], *, threads: int | None = None) -> Launch:
    """The run that computes h of (a, b, initial state)."""
    from subquad_numpy.linear_scan.kernel import SCAN_RECORD, linear_scan_kernel

    b = likes[1]
    return Launch(
        "linear_scan", linear_scan_kernel, (np.dtype(b.dtype).name,), SCAN_RECORD, _places(FORWARD, likes),
        {"h": Like(tuple(b.shape), b.dtype)}, *_cut_work(b, static, threads),
    )  # fmt: skip


def launch_backward(likes: Sequence[Any], static: Mapping[str, Any], *, threads: int | None = None) -> Launch:
    """The run that computes the gradients from (a, b, initial state, h, gradient by h); b is not read.

    That by the initial state is written also where there is none.
    """
    from subquad_numpy.linear_scan.kernel import GRADIENT_RECORD, linear_scan_gradient_kernel

    b = likes[1]
    whole, state = Like(tuple(b.shape), b.dtype), Like((b.shape[0], b.shape[2]), b.dtype)
    return Launch(
        "linear_scan_gradient", linear_scan_gradient_kernel, (np.dtype(b.dtype).name,), GRADIENT_RECORD,
        {name: place for name, place in _places(GRADIENT, (*likes[:3], b, b)).items() if name != "b"},
        {"grad_a": whole, "grad_b": whole, "grad_initial_state": state}, *_cut_work(b, static, threads),
    )  # fmt: skip


def _cut_work(like: Any, static: Mapping[str, Any], threads: int | None) -> tuple[dict[str, int], int, int]:
    """(sizes of the record, number of tasks, number of threads); a task is a block of channels of one item."""
    from subquad_numpy.codegen import lanes_of

    batch, n, d = like.shape
    threads = 1 if batch * n * d < SMALL else thread_count(threads)
    lanes = lanes_of(np.dtype(like.dtype))
    block = max(1, -(-d // (lanes * -(-threads // max(1, batch))))) * lanes
    return {"n": n, "d": d, "block": block, "reverse": int(static["reverse"])}, batch * -(-d // block), threads


def _places(names: Sequence[str], likes: Sequence[Any]) -> dict[str, int]:
    return {name: place for place, (name, x) in enumerate(zip(names, likes, strict=True)) if x is not None}


def _run(plan: Launch, given: Sequence[Array | None], outputs: Mapping[str, Array]) -> None:
    dtype = next(iter(outputs.values())).dtype
    arrays: dict[str, Any] = {name: np.ascontiguousarray(given[place], dtype) for name, place in plan.operands.items()}
    arrays |= outputs
    record = record_of(plan.fields, {**dict.fromkeys(plan.fields), **plan.sizes, **arrays})
    run_tasks(plan.make(*plan.kind), plan.tasks, record, plan.threads, arrays)
