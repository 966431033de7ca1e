"""Argument records: the int64 numbers and addresses that a compiled kernel reads, one record for each batch item.

A record type maps the name of each field to

    None       a number
    an int     the address of an array, of whose last axes so many belong to one item
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from subquad_numpy.runtime.addresses import KNOWN, address_of, asked_address, read_address
from subquad_numpy.runtime.threads import run_tasks, thread_count

Array = np.ndarray[Any, Any]
Fields = dict[str, int | None]

DONE, FOREIGN = 1, -1  # what a direct call returns: see `codegen.compile.DONE`, `runtime.direct.FOREIGN`
# Multiply-adds of a call, with the exponentials beside them some 300 µs of one core: below that, waking a second thread
# costs more than it saves, and waiting for it far more where other processes keep the cores busy.
SMALL = 9 << 19
LARGE = 4 << 20  # bytes of an output for which it is worth asking for huge pages, as NumPy has it
MAX_FORMS = 512  # forms of calls that `Forms` remembers before it forgets all


def fields(*parts: Mapping[str, int | None]) -> Fields:
    """The record type that has all these fields: numbers first, then addresses."""
    whole = {name: axes for part in parts for name, axes in part.items()}
    return dict(sorted(whole.items(), key=lambda field: field[1] is not None))


class Constant(NamedTuple):
    """An array that all calls of a `Run` read, which therefore has its address: a call gives None in its place."""

    array: Array


class Run:
    """A kernel with argument records made for arrays of one form, so that a call only adds the arrays' addresses.

    `values` holds, by field, a number (or one number for each item), an example of the arrays to come, or a `Constant`;
    an array field that is missing from `values` must be None at every call.
    `tasks` and `products` count tasks and multiply-adds of one item: a small call runs on one thread. `given` names the
    array fields that a call gives, in this order; by default all.
    """

    def __init__(
        self, kernel: Any, fields: Fields, batch: tuple[int, ...], tasks: int, products: float,
        values: Mapping[str, Any], given: Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        items = math.prod(batch)
        # An address field holds the bytes from the start of the array to the item's part, until a call adds the start.
        self.records = np.zeros((items, len(fields)), np.int64)
        places = {name: place for place, (name, axes) in enumerate(fields.items()) if axes is not None}
        self.places = np.array([places[name] for name in (places if given is None else given)], np.int64)
        self.constants = [x for x in values.values() if isinstance(x, Constant)]
        for place, (name, axes) in enumerate(fields.items()):
            x = values.get(name)
            if axes is None:
                self.records[:, place] = 0 if x is None else x
            elif isinstance(x, Constant):
                self.records[:, place] = address_of(x.array)
            elif items > 1 and x is not None and x.ndim > axes:
                self.records[:, place] = offsets(x, batch, axes)
        self.kernel, self.tasks, self.small = kernel, items * tasks, items * products < SMALL
        self.pack = struct.Struct(f"{len(self.places)}q").pack
        # the compiled call on one thread: what is called only once need not wait until that is compiled, too
        self.direct: Any = None
        self.has_run = self.meets_foreign = False  # arrays of other libraries go by addresses at once

    def __call__(self, arrays: Sequence[Any], threads: int | None) -> None:
        """Run all tasks on the arrays of the fields that are given: NumPy's, or of `addresses.KNOWN`."""
        if self.tasks == 0:
            return
        is_alone = self.small or threads == 1
        if is_alone and self.direct is not None:
            done = FOREIGN
            if not self.meets_foreign:
                done = self.direct(self.of_objects + self.pack(*map(id, arrays)))
            if done == FOREIGN:
                self.meets_foreign = True
                found = [0 if x is None else KNOWN.get(type(x), asked_address)(x) for x in arrays]  # as `address_of`
                done = self.direct(self.of_addresses + self.pack(*found))
            if done != DONE:
                msg = "a compiled kernel found no memory for its scratch"
                raise MemoryError(msg)
            return
        records = self.records.copy()
        records[:, self.places] += [0 if x is None else address_of(x) for x in arrays]
        if is_alone:
            self.kernel(0, self.tasks, address_of(records))
            if self.has_run and address_of is read_address:
                self._call_directly()
            self.has_run = True
        else:
            run_tasks(self.kernel, self.tasks, records, thread_count(threads), arrays)

    def _call_directly(self) -> None:
        """Let the calls to come, on one thread, be of compiled code alone."""
        from subquad_numpy.runtime.direct import direct, head_of

        self.of_objects, self.of_addresses = (
            head_of(self.kernel, self.tasks, self.records, self.places, objects=objects) for objects in (True, False)
        )
        self.direct = direct()


def run(
    kernel: Any, fields: Fields, batch: tuple[int, ...], tasks: int, products: float, threads: int | None,
    **values: Any,
) -> None:  # fmt: skip
    """Run a kernel once, on the numbers and arrays of `values`."""
    given = [values.get(name) for name, axes in fields.items() if axes is not None]
    arrays = [None if isinstance(x, Constant) else x for x in given]
    Run(kernel, fields, batch, tasks, products, values)(arrays, threads)


class Forms:
    """A forward pass that is planned once for each form of a call: shapes, strides, dtypes, and all static keywords.

    `plan(arrays, static, save)` returns a function (arrays, new, threads) → (outputs, saved) for calls of that form. A
    function that is `straight` takes arrays of any library in memory of the host, as `new` makes them; it returns None
    for those whose numbers it cannot compute with.
    """

    def __init__(self, plan: Callable[..., Callable[..., Any]]) -> None:
        self.plan, self.__doc__ = plan, plan.__doc__
        self.kept: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self, arrays: Sequence[Array | None], static: Mapping[str, Any], *, new: Callable[..., Array] = np.empty,
        save: bool = False, threads: int | None = None,
    ) -> tuple[tuple[Array, ...], Any]:  # fmt: skip
        """The outputs, and what the backward pass needs beside the outputs."""
        return self.planned(arrays, static, save)(arrays, new, threads)

    def planned(self, arrays: Sequence[Array | None], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
        """The function (arrays, new, threads) → (outputs, saved) for calls of the form of these arrays."""
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
        return planned

    def bound(
        self, arrays: Sequence[Array | None], static: Mapping[str, Any], *, masked: bool
    ) -> Callable[..., Any] | None:
        """A function of arrays like these, for the outputs; None unless memory holds their numbers as they are.

        For arrays of one class, shape and dtype, it goes straight to the plan if strides are those of these arrays. If
        `masked`, the last of the arrays is the keyword `key_mask`.
        """
        if not all(x is None or x.flags.behaved for x in arrays):
            return None
        planned, new, static = self.planned(arrays, static, save=False), np.empty, dict(static)
        layouts = [None if x is None or x.flags.carray else x.strides for x in arrays]

        def run(*arrays: Array | None, key_mask: Array | None = None) -> Any:
            given = (*arrays, key_mask) if masked else arrays
            outputs, _ = planned(given, new, None) if have_layouts(given, layouts) else self(given, static)
            return outputs if len(outputs) > 1 else outputs[0]

        return run


def straight(planned: Callable[..., Any], *, short: bool = False) -> Callable[..., Any]:
    """Say of a planned function that it does nothing with arrays but pass them on to runs of kernels.

    One that is `short` runs on the caller's thread, and need not be given any number of threads.
    """
    planned.is_straight, planned.is_short = True, short  # type: ignore[attr-defined]
    return planned


def have_layouts(arrays: Sequence[Array | None], layouts: Sequence[tuple[int, ...] | None]) -> bool:
    """Whether all arrays are aligned, writeable, and contiguous (None) or of these strides."""
    for x, strides in zip(arrays, layouts):  # noqa: B905  # a check of lengths takes time at every call
        if x is not None:
            flags = x.flags
            if not (flags.carray if strides is None else flags.behaved and x.strides == strides):
                return False
    return True


Fix = Callable[[Array], Array] | None  # a copy that makes arrays of a form readable for kernels; None: none is needed


def fix_rows(x: Array) -> Fix:
    """The fix after which the numbers of a row are adjacent and strides are whole elements, for arrays like x."""
    return np.ascontiguousarray if x.strides[-1] != x.itemsize and x.shape[-1] != 1 else fix_elements(x)


def fix_elements(x: Array) -> Fix:
    """The fix after which strides are whole elements, for arrays like x: a field of a structure may have others."""
    whole = x.flags.aligned and all(stride % x.itemsize == 0 for stride in x.strides)
    return None if whole else np.array


def fix_items(x: Array, axes: int) -> Fix:
    """The fix after which the last `axes` axes, those of an item, are contiguous, for arrays like x."""
    size = x.itemsize
    for length, stride in zip(x.shape[: -axes - 1 : -1], x.strides[: -axes - 1 : -1], strict=True):
        if length != 1 and stride != size:
            return np.ascontiguousarray
        size *= length
    return fix_elements(x)


def fixed(fix: Fix, x: Array) -> Array:
    """The array itself if there is nothing to fix, else a fixed copy."""
    return x if fix is None else fix(x)


def with_whole_rows(x: Array) -> Array:
    """The array itself where the numbers of a row are adjacent, else a copy."""
    return fixed(fix_rows(x), x)


def with_whole_items(x: Array, axes: int) -> Array:
    """The array itself where the last `axes` axes are contiguous, else a copy."""
    return fixed(fix_items(x, axes), x)


def row_step(x: Array) -> int:
    """The stride from row to row, in elements."""
    return x.strides[-2] // x.itemsize


def offsets(x: Array, batch: tuple[int, ...], core: int) -> Array:
    """Bytes from the first element of x to that of each batch item; the last `core` axes of x belong to the item."""
    own = x.ndim - core  # batch axes that x has; missing ones and those of length 1 are broadcast, with step 0
    places = np.zeros(1, np.int64)
    for back, size in enumerate(reversed(batch), start=1):
        if size != 1:
            axis = own - back
            step = x.strides[axis] if axis >= 0 and x.shape[axis] > 1 else 0
            places = (np.arange(size)[:, None] * step + places).reshape(-1)
    return places
