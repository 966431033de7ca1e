"""The compiled fixed scan on NumPy arrays, and its gradient: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fixed
from subquad_numpy.runtime.stored import computed, stored_word
from subquad_numpy.runtime.threads import thread_count
from subquad_numpy.selective_scan.calls import cut_channels

Array = np.ndarray[Any, Any]
SMALL, SMALL_GRADIENT = 1 << 18, 1 << 17  # state updates of a call, about 50 µs: below that, one thread suffices


def _plan_scan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`lti_scan`: y and the last state."""
    u, rate = arrays[:2]
    shape, dtype, dtype_of_state = u.shape, u.dtype, rate.dtype  # y is stored as u is
    of_state = (shape[0], *rate.shape)
    fix = [None if a is None else fix_items(a, a.ndim) for a in arrays]
    must_fix, is_small = any(f is not None for f in fix), u.size * rate.shape[1] < SMALL
    runs: dict[int, Run] = {}  # by the number of threads, on which the width of a block depends

    def scan(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, Array], None]:
        y, state = new(shape, dtype), new(of_state, dtype_of_state)
        if 0 in (y.size, state.size):
            y[...] = 0 if arrays[4] is None else arrays[4] * arrays[0]
            state[...] = 0 if arrays[5] is None else arrays[5]
            return (y, state), None
        count = 1 if is_small else thread_count(threads)
        run = runs.get(count)
        if run is None:
            from subquad_numpy.lti_scan.forward import FORWARD_RECORD, forward_kernel

            sizes, tasks = cut_work(arrays, static, count)
            sizes["stored"] = stored_word((u, u))
            run = runs[count] = Run(forward_kernel(*kind_of(arrays)), FORWARD_RECORD, (), tasks, math.inf, sizes)
        run((*map(fixed, fix, arrays), y, state) if must_fix else (*arrays, y, state), count if is_small else threads)
        return (y, state), None

    return scan


scan = Forms(_plan_scan)


def scan_backward(
    arrays: Sequence[Array | None], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of `scan`: ∂/∂Re + i ∂/∂Im of the real loss.

    States are computed again from checkpoints every `backward.TILE` steps, which a task has for a vector of channels.
    Sums over batch and time are in float64. The number of threads does not change the result.
    """
    u, rate, _, _, D, initial_state, *_ = arrays
    assert u is not None
    assert rate is not None
    (batch, _, d), of_state = u.shape, (u.shape[0], *rate.shape)
    given = [None if a is None else np.ascontiguousarray(a) for a in arrays]
    grad_y, grad_state = (
        np.zeros(shape, x.dtype) if by is None else np.ascontiguousarray(by)
        for by, shape, x in zip(grads, (u.shape, of_state), (u, rate), strict=True)
    )
    grad_u, grad_initial = np.zeros_like(u, order="C"), grad_state.copy()
    wide = np.result_type(rate.dtype, np.float64)
    sums, sum_D = [np.zeros(of_state, wide) for _ in range(3)], np.zeros((batch, d))
    if u.size and rate.size:
        from subquad_numpy.lti_scan.backward import BACKWARD_RECORD, backward_kernel

        sizes, tasks = cut_gradient(arrays, static)
        sizes["stored"] = stored_word((u, grad_y, grad_u))
        run = Run(backward_kernel(*kind_of(arrays)), BACKWARD_RECORD, (), tasks, math.inf, sizes)
        is_small = u.size * rate.shape[1] < SMALL_GRADIENT
        run((*given, grad_y, grad_state, grad_u, grad_initial, *sums, sum_D), 1 if is_small else thread_count(threads))
    by_model = [x.sum(axis=0).astype(rate.dtype) for x in sums]
    by_D = None if D is None else sum_D.sum(axis=0).astype(D.dtype)
    return grad_u, *by_model, by_D, None if initial_state is None else grad_initial, None, None


def cut_gradient(arrays: Sequence[Any], static: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """(numbers of the argument record, tasks) of the gradient, which do not depend on the number of threads."""
    from subquad_numpy.codegen import lanes_of
    from subquad_numpy.selective_scan.calls import cut_gradient as cut_blocks

    batch, _, d = arrays[0].shape
    block, blocks = cut_blocks(batch, 1, d, lanes_of(computed(arrays[0].dtype)))
    return sizes_of(arrays, static, block), batch * blocks


def kind_of(arrays: Sequence[Any]) -> tuple[str, bool]:
    """What the kernels are specialised for: (dtype to compute in, is the model complex)."""
    u, rate = arrays[:2]
    return computed(u.dtype).name, np.dtype(rate.dtype).kind == "c"


def cut_work(arrays: Sequence[Any], static: Mapping[str, Any], threads: int) -> tuple[dict[str, int], int]:
    """(numbers of the argument record, tasks) of a scan; a task is a block of channels of one item."""
    from subquad_numpy.codegen import lanes_of

    (batch, _, d), lanes = arrays[0].shape, lanes_of(computed(arrays[0].dtype))
    block, tasks = cut_channels(batch, 1, d, threads, lanes)
    return sizes_of(arrays, static, block), tasks


def sizes_of(arrays: Sequence[Any], static: Mapping[str, Any], block: int) -> dict[str, int]:
    """The numbers of an argument record."""
    (_, n, d), mask = arrays[0].shape, arrays[7]
    sizes = {"n": n, "d": d, "d_state": arrays[1].shape[1], "block": block, "reverse": int(static["reverse"])}
    return sizes | {"mask_step": 0 if mask is None or mask.shape[0] == 1 else n}
