"""Calls of a kernel on arrays: their sizes, strides and addresses as one frame of int64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from subquad_numpy._threads import run_tasks, thread_count

Array = np.ndarray[Any, Any]

SMALL = 1 << 20  # products and sums, some 10 µs: less than handing work to a thread is worth


def run(
    kernel: Any, order: tuple[str, ...], tasks: int, products: int, threads: int | None, **values: Any
) -> None:  # fmt: skip
    """Run a kernel whose frame has the fields `order`: sizes and addresses."""
    run_tasks(kernel, tasks, frame_of(order, values), 1 if products < SMALL else thread_count(threads), values)


def frame_of(order: tuple[str, ...], values: Mapping[str, Any]) -> Array:
    """Sizes and addresses in the order of a kernel's fields; 0 for None."""
    words = [values[name] for name in order]
    return np.array([x.ctypes.data if isinstance(x, np.ndarray) else x or 0 for x in words], np.int64)


def with_whole_rows(x: Array) -> Array:
    """The array itself where the numbers of a row are adjacent, else a copy."""
    adjacent = x.strides[-1] == x.itemsize or x.shape[-1] == 1
    return in_elements(x) if adjacent else np.ascontiguousarray(x)


def in_elements(x: Array) -> Array:
    """The array itself where its strides are whole elements, else a copy: a field of a structure may have others."""
    whole = x.flags.aligned and all(stride % x.itemsize == 0 for stride in x.strides)
    return x if whole else x.copy()


def row_step(x: Array) -> int:
    return x.strides[-2] // x.itemsize


def offsets(x: Array, batch: tuple[int, ...], core: int) -> Array:
    """Elements from the first to that of each item of the batch; `core` axes belong to the item."""
    own = x.ndim - core
    places = np.zeros(1, np.int64)
    for back, size in enumerate(reversed(batch), start=1):
        if size != 1:
            axis = own - back
            step = x.strides[axis] // x.itemsize if axis >= 0 and x.shape[axis] > 1 else 0
            places = (np.arange(size)[:, None] * step + places).reshape(-1)
    return places
