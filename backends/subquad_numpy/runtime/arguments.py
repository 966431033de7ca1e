"""Argument records: what a compiled kernel is told of a call, as int64 numbers and addresses, one record an item.

A record type is a mapping: name → None for a number, else how many of an array's last axes belong to one item.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad_numpy.runtime.threads import run_tasks, thread_count

Array = np.ndarray[Any, Any]
Fields = dict[str, int | None]

SMALL = 1 << 20  # products and sums, some 10 µs: less than handing work to a thread is worth
MAX_FORMS = 512  # of calls that are remembered


def fields(*parts: Mapping[str, int | None]) -> Fields:
    """A record type of all these fields: numbers first, then addresses."""
    whole = {name: axes for part in parts for name, axes in part.items()}
    return dict(sorted(whole.items(), key=lambda field: field[1] is not None))


class Run:
    """Runs of a kernel over the items of a batch, on arrays of one form: only their addresses are new at a call.

    `values` has, by field, the numbers (one, or one for each item), and for an array one of the form of those to come;
    of a field that it lacks, None must come.
    `tasks` and `products` are those of an item: with few products in all, one thread does.
    """

    def __init__(
        self, kernel: Any, fields: Fields, batch: tuple[int, ...], tasks: int, products: float,
        values: Mapping[str, Any],
    ) -> None:  # fmt: skip
        items = math.prod(batch)
        # for an address, the bytes from that of the whole array to the item's own part
        self.records = np.zeros((items, len(fields)), np.int64)
        self.first = sum(axes is None for axes in fields.values())
        for place, (name, axes) in enumerate(fields.items()):
            x = values.get(name)
            if axes is None:
                self.records[:, place] = 0 if x is None else x
            elif items > 1 and x is not None and x.ndim > axes:
                self.records[:, place] = offsets(x, batch, axes)
        self.kernel, self.tasks, self.small = kernel, items * tasks, items * products < SMALL

    def __call__(self, arrays: Sequence[Array | None], threads: int | None) -> None:
        """Run on these arrays, in the order of the fields."""
        if self.tasks == 0:
            return
        records = self.records.copy()
        records[:, self.first :] += [0 if x is None else x.__array_interface__["data"][0] for x in arrays]
        if self.small:
            self.kernel(0, self.tasks, records)
        else:
            run_tasks(self.kernel, self.tasks, records, thread_count(threads), arrays)


def run(
    kernel: Any, fields: Fields, batch: tuple[int, ...], tasks: int, products: float, threads: int | None,
    **values: Any,
) -> None:  # fmt: skip
    """Run a kernel once."""
    arrays = [values.get(name) for name, axes in fields.items() if axes is not None]
    Run(kernel, fields, batch, tasks, products, values)(arrays, threads)


class Forms:
    """A forward pass that is planned once for each form of a call: shapes, strides, dtypes, and what is not an array.

    `plan(arrays, static, save)` is a function (arrays, new, threads) → (outputs, saved) for all calls of that form.
    """

    def __init__(self, plan: Callable[..., Callable[..., Any]]) -> None:
        self.plan, self.__doc__ = plan, plan.__doc__
        self.kept: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self, arrays: Sequence[Array | None], static: Mapping[str, Any], *, new: Callable[..., Array] = np.empty,
        save: bool = False, threads: int | None = None,
    ) -> tuple[tuple[Array, ...], Any]:  # fmt: skip
        """The outputs, and what the backward pass needs beside them."""
        form = (
            save,
            *static.items(),
            *[None if x is None else (x.shape, x.strides, x.dtype, x.flags.aligned) for x in arrays],
        )
        planned = self.kept.get(form)
        if planned is None:
            planned = self.plan(arrays, static, save)
            if len(self.kept) >= MAX_FORMS:
                self.kept.clear()
            self.kept[form] = planned
        return planned(arrays, new, threads)


Fix = Callable[[Array], Array] | None  # what must be done to arrays of a form; None: nothing


def fix_rows(x: Array) -> Fix:
    """For arrays like x: the numbers of a row must be adjacent, and strides whole elements."""
    return np.ascontiguousarray if x.strides[-1] != x.itemsize and x.shape[-1] != 1 else fix_elements(x)


def fix_elements(x: Array) -> Fix:
    """For arrays like x: strides must be whole elements, in place; a field of a structure may have others."""
    whole = x.flags.aligned and all(stride % x.itemsize == 0 for stride in x.strides)
    return None if whole else np.array


def fix_items(x: Array, axes: int) -> Fix:
    """For arrays like x: the last axes, an item's own, must be contiguous."""
    size = x.itemsize
    for length, stride in zip(x.shape[: -axes - 1 : -1], x.strides[: -axes - 1 : -1], strict=True):
        if length != 1 and stride != size:
            return np.ascontiguousarray
        size *= length
    return fix_elements(x)


def fixed(fix: Fix, x: Array) -> Array:
    """The array, or a copy that is as it must be."""
    return x if fix is None else fix(x)


def with_whole_rows(x: Array) -> Array:
    """The array itself where the numbers of a row are adjacent, else a copy."""
    return fixed(fix_rows(x), x)


def with_whole_items(x: Array, axes: int) -> Array:
    """The array itself where the last axes are contiguous, else a copy."""
    return fixed(fix_items(x, axes), x)


def row_step(x: Array) -> int:
    """Elements from row to row."""
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
