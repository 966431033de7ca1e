"""The compiled linear scan on NumPy arrays, and its gradient."""

from typing import Any

import numpy as np

from subquad_numpy.codegen import lanes_of
from subquad_numpy.linear_scan.kernel import (
    GRADIENT_RECORD,
    SCAN_RECORD,
    linear_scan_gradient_kernel,
    linear_scan_kernel,
)
from subquad_numpy.runtime.arguments import frame_of
from subquad_numpy.runtime.threads import run_tasks, thread_count

Array = np.ndarray
SMALL = 1 << 16  # elements, some 30 µs: less than handing work to a thread is worth


def linear_scan_forward(
    a: Array,
    b: Array,
    initial_state: Array | None = None,
    reverse: bool = False,
    *,
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """h[t] = a[t] h[t-1] + b[t] along the second axis.

    Parameters
    ----------
    a, b : array, shape (batch, n, d)
        Factors and terms; float32, float64, complex64 or complex128, both of the type of `b`.
    initial_state : array, shape (batch, d), optional
        h[-1]. Default: zeros.
    reverse : bool
        Whether time runs from the end.
    threads : int, optional
        Default: OMP_NUM_THREADS, NUMBA_NUM_THREADS and the cores of the process, whichever is least.
    out : array, shape (batch, n, d), optional
        Where h goes, contiguous. Default: a new array.

    Returns
    -------
    array, shape (batch, n, d)
        h.
    """
    arrays = _contiguous(b.dtype, a=a, b=b, initial_state=initial_state)
    h = np.empty_like(arrays["b"]) if out is None else out
    if h.size:
        _run(linear_scan_kernel(b.dtype.name), SCAN_RECORD, h, reverse, threads, **arrays, h=h)
    return h


def linear_scan_backward(
    a: Array,
    h: Array,
    initial_state: Array | None,
    reverse: bool,
    grad_h: Array,
    *,
    threads: int | None = None,
) -> tuple[Array, Array, Array | None]:
    """Gradients by a, b and the initial state of `linear_scan_forward`, given that by h.

    Parameters
    ----------
    a : array, shape (batch, n, d)
        The factors.
    h : array, shape (batch, n, d)
        What `linear_scan_forward` returned; b is not needed.
    initial_state : array, shape (batch, d), or None
        As given there.
    reverse : bool
        As given there.
    grad_h : array, shape (batch, n, d)
        Gradient by h.
    threads : int, optional
        As there.

    Returns
    -------
    tuple of array
        Gradients; the last is None without initial state. Of complex inputs: ∂/∂Re + i ∂/∂Im of the real
        loss.
    """
    arrays = _contiguous(h.dtype, a=a, h=h, initial_state=initial_state, grad_h=grad_h)
    grad_a, grad_b = np.empty_like(arrays["h"]), np.empty_like(arrays["h"])
    grad_initial_state = np.zeros((h.shape[0], h.shape[2]), h.dtype)
    results = {"grad_a": grad_a, "grad_b": grad_b, "grad_initial_state": grad_initial_state}
    if h.size:
        kernel = linear_scan_gradient_kernel(h.dtype.name)
        _run(kernel, GRADIENT_RECORD, grad_b, reverse, threads, **arrays, **results)
    return grad_a, grad_b, None if initial_state is None else grad_initial_state


def _contiguous(dtype: Any, **arrays: Array | None) -> dict[str, Array]:
    return {name: np.ascontiguousarray(array, dtype) for name, array in arrays.items() if array is not None}


def _run(kernel: Any, order: tuple[str, ...], like: Array, reverse: bool, threads: int | None, **arrays: Array) -> None:
    sizes, tasks, threads = cut_work(like.shape, like.dtype, reverse, threads)
    run_tasks(kernel, tasks, frame_of(order, {**dict.fromkeys(order), **sizes, **arrays}), threads, arrays)


def cut_work(
    shape: tuple[int, ...], dtype: Any, reverse: bool, threads: int | None = None
) -> tuple[dict[str, int], int, int]:
    """(sizes for the frame, number of tasks, number of threads); a task is a block of channels of one item."""
    batch, n, d = shape
    threads = 1 if batch * n * d < SMALL else thread_count(threads)
    lanes = lanes_of(dtype)
    block = -(-d // (lanes * -(-threads // batch))) * lanes
    return {"n": n, "d": d, "block": block, "reverse": int(reverse)}, batch * -(-d // block), threads
