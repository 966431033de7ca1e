"""Calls of a kernel on arrays: sizes, strides and addresses as records of int64, one for each item of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from subquad_numpy.runtime.threads import run_tasks, thread_count

Array = np.ndarray[Any, Any]

SMALL = 1 << 20  # products and sums, some 10 µs: less than handing work to a thread is worth


def run(
    kernel: Any, fields: Mapping[str, int | None], batch: tuple[int, ...], tasks: int, products: int,
    threads: int | None, **values: Any,
) -> None:  # fmt: skip
    """Run a kernel with so many tasks, and products, for each item of the batch."""
    records = records_of(fields, batch, values)
    if not len(records):
        return
    threads = 1 if len(records) * products < SMALL else thread_count(threads)
    run_tasks(kernel, len(records) * tasks, records, threads, values)


def record_of(order: Iterable[str], values: Mapping[str, Any]) -> Array:
    """Sizes and addresses in the order of a kernel's fields; 0 for None."""
    words = [values[name] for name in order]
    return np.array([x.ctypes.data if isinstance(x, np.ndarray) else x or 0 for x in words], np.int64)


def records_of(fields: Mapping[str, int | None], batch: tuple[int, ...], values: Mapping[str, Any]) -> Array:
    """The frame of each item; of an array, the address of the item's own part, with as many axes as `fields` says."""
    records = record_of(fields, values)[None].repeat(math.prod(batch), axis=0)
    if len(records) > 1:
        for place, (name, axes) in enumerate(fields.items()):
            x = values[name]
            if axes is not None and x is not None and x.ndim > axes:
                records[:, place] += offsets(x, batch, axes)
    return records


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
    """Bytes from the first element to that of each item of the batch; `core` axes belong to the item."""
    own = x.ndim - core
    places = np.zeros(1, np.int64)
    for back, size in enumerate(reversed(batch), start=1):
        if size != 1:
            axis = own - back
            step = x.strides[axis] if axis >= 0 and x.shape[axis] > 1 else 0
            places = (np.arange(size)[:, None] * step + places).reshape(-1)
    return places
