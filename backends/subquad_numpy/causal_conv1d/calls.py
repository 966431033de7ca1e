"""The compiled convolution on NumPy arrays, and its gradient, as `subquad_numpy.compiled.Compiled` describes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fixed
from subquad_numpy.runtime.stored import computed, stored_word
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]
ROWS = 64  # steps of a task: their inputs stay in a second-level cache
SMALL, SMALL_GRADIENT = 1 << 17, 1 << 16  # elements of a call, about 60 µs: below that, one thread suffices


def _plan_conv(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`causal_conv1d`: y and the last inputs."""
    x, weight = arrays[:2]
    dtype, shape = computed(x.dtype), x.shape
    of_state = (shape[0], weight.shape[1] - 1, shape[2])
    fix = [None if a is None else fix_items(a, a.ndim) for a in arrays]
    must_fix = any(f is not None for f in fix)
    is_small, sizes = x.size < SMALL, sizes_of(x, weight, static) | {"block": ROWS, "stored": stored_word((x, x))}
    runs: list[Run] = []

    def conv(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, Array], None]:
        y, state = new(shape, x.dtype), new(of_state, dtype)
        if not y.size:
            state[...] = 0 if arrays[3] is None else arrays[3]
            return (y, state), None
        if not runs:
            from subquad_numpy.causal_conv1d.forward import FORWARD_RECORD, forward_kernel

            tasks = shape[0] * -(-shape[1] // ROWS)
            runs.append(Run(forward_kernel(dtype.name), FORWARD_RECORD, (), tasks, math.inf, sizes))
        given = map(fixed, fix, arrays) if must_fix else arrays
        runs[0]((*given, y, state), 1 if is_small else threads)
        return (y, state), None

    return conv


conv = Forms(_plan_conv)


def conv_backward(
    arrays: Sequence[Array | None], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of `conv`. Sums over time are in float64; the number of threads does not change the result."""
    x, weight, bias, initial_state, resets = arrays
    assert x is not None
    assert weight is not None
    (batch, _, d), width, dtype = x.shape, weight.shape[1], computed(x.dtype)
    of_state = (batch, width - 1, d)
    grad_y, grad_state = (
        np.zeros(shape, dtype) if by is None else np.ascontiguousarray(by)
        for by, shape in zip(grads, (x.shape, of_state), strict=True)
    )
    grad_x, grad_initial = np.empty_like(x, order="C"), grad_state.copy()
    sums = np.zeros((batch, width, d)), np.zeros((batch, d))
    if x.size:
        from subquad_numpy.causal_conv1d.backward import BACKWARD_RECORD, backward_kernel

        block, tasks = cut_gradient(x)
        sizes = sizes_of(x, weight, static) | {"block": block, "stored": stored_word((x, grad_y, grad_x))}
        run = Run(backward_kernel(dtype.name), BACKWARD_RECORD, (), tasks, math.inf, sizes)
        given = [None if a is None else np.ascontiguousarray(a) for a in (bias, initial_state, resets)]
        everything = (np.ascontiguousarray(x), taps_of(np, weight), *given, grad_y, grad_state, grad_x, grad_initial)
        run((*everything, *sums), 1 if x.size < SMALL_GRADIENT else thread_count(threads))
    by_weight = sums[0].sum(axis=0)[::-1].T.astype(dtype, order="C")
    by_bias = None if bias is None else sums[1].sum(axis=0).astype(dtype)
    return grad_x, by_weight, by_bias, None if initial_state is None else grad_initial, None


def taps_of(xp: Any, weight: Array) -> Array:
    """The taps as the gradient takes them: (width, d), contiguous, row k for the input k steps before."""
    return xp.flip(weight, axis=1).T.copy() if xp is np else xp.matrix_transpose(xp.flip(weight, axis=1))


def sizes_of(x: Any, weight: Any, static: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of an argument record but for the block."""
    flags = {name: int(static[name]) for name in ("reverse", "silu")}
    return {"n": x.shape[1], "d": x.shape[2], "width": weight.shape[1], **flags}


def cut_gradient(x: Any) -> tuple[int, int]:
    """(channels of a block, tasks) of the gradient, which do not depend on the number of threads."""
    from subquad_numpy.codegen import lanes_of
    from subquad_numpy.selective_scan.calls import cut_gradient as cut_channels

    batch, _, d = x.shape
    block, blocks = cut_channels(batch, 1, d, lanes_of(computed(x.dtype)))
    return block, batch * blocks
