"""The compiled linear scan on NumPy arrays, and its gradient, as `subquad_numpy.compiled.Compiled` describes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fixed, straight
from subquad_numpy.runtime.stored import common, computed, stored_word, widest
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]
# Elements of a call, about 50 µs: below that, a second thread, which takes 10 µs to wake, is not worth its core. The
# gradient reads and writes three times as much.
SMALL, SMALL_GRADIENT = 1 << 18, 1 << 16


def _plan_scan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`linear_scan`: the states h[t] = a[t] h[t−1] + b[t] along the second axis."""
    a, b, *_ = arrays
    shape, dtype, out_dtype, is_small = b.shape, widest(a, b), common(a, b), b.size < SMALL
    fix = [None if x is None else fix_items(x, x.ndim) for x in arrays]
    must_fix = any(f is not None for f in fix)
    stored = stored_word((a, b, b if out_dtype == b.dtype else None))
    runs: dict[int, Run] = {}  # by the number of threads, on which the width of a block depends

    def scan(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array], None]:
        h = new(shape, out_dtype)
        if not h.size:
            return (h,), None
        count = 1 if is_small else thread_count(threads)
        run = runs.get(count)
        if run is None:
            from subquad_numpy.linear_scan.kernel import SCAN_RECORD, linear_scan_kernel

            sizes, tasks, _ = cut_work(shape, dtype, static["reverse"], count)
            sizes["stored"] = stored
            run = runs[count] = Run(linear_scan_kernel(dtype.name), SCAN_RECORD, (), tasks, math.inf, sizes)
        run((*map(fixed, fix, arrays), h) if must_fix else (*arrays, h), count)
        return (h,), None

    return straight(scan) if is_small and not must_fix else scan


scan = Forms(_plan_scan)


def scan_backward(
    arrays: Sequence[Array | None], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...] | None:  # fmt: skip
    """The gradients of `scan`: ∂/∂Re + i ∂/∂Im of the real loss."""
    if grads[0] is None:
        return None
    from subquad_numpy.linear_scan.kernel import GRADIENT_RECORD, linear_scan_gradient_kernel

    a, b, initial_state, resets = arrays
    h, grad_h = outputs[0], grads[0]
    assert a is not None
    dtype, dtype_of_b = computed(h.dtype), h.dtype if b is None else b.dtype
    new = np.empty if h.size else np.zeros
    found = new(h.shape, a.dtype), new(h.shape, dtype_of_b), new((h.shape[0], h.shape[2]), dtype)
    if h.size:
        given = [None if x is None else np.ascontiguousarray(x) for x in (a, h, initial_state, resets, grad_h)]
        sizes, tasks, count = cut_work(h.shape, dtype, static["reverse"], threads, small=SMALL_GRADIENT)
        sizes["stored"] = stored_word((a, h, grad_h, *found[:2]))
        kernel = linear_scan_gradient_kernel(dtype.name)
        Run(kernel, GRADIENT_RECORD, (), tasks, math.inf, sizes)((*given, *found), count)
    return found[0], found[1], None if initial_state is None else found[2], None


def cut_work(
    shape: tuple[int, ...], dtype: Any, reverse: bool, threads: int | None = None, *, small: int = SMALL
) -> tuple[dict[str, int], int, int]:
    """(numbers of the argument record, tasks, threads) of a scan; a task is a block of channels of one item."""
    from subquad_numpy.codegen import lanes_of

    batch, n, d = shape
    threads = 1 if batch * n * d < small else thread_count(threads)
    lanes = lanes_of(dtype)
    block = -(-d // (lanes * -(-threads // batch))) * lanes
    return {"n": n, "d": d, "block": block, "reverse": int(reverse)}, batch * -(-d // block), threads
