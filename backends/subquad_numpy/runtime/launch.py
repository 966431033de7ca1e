"""What one run of a compiled kernel needs to be told, before there are arrays: how a compiler of programs calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from subquad.backend import Like

Array = Any


class Rows(NamedTuple):
    """A result that tasks leave in so many parts, zeros before, which are added up; in float64 if `wide`."""

    parts: int
    wide: bool


@dataclass(frozen=True)
class Launch:
    """One run of a compiled kernel on contiguous arrays.

    Attributes
    ----------
    compile : callable
        Compiles the kernel for a `kind`, once: a function that is cached.
    kind : tuple
        Its arguments; the first is the dtype.
    record : mapping
        The fields of an argument record, in order. Of an array, how many of its last axes are an item's own; None for a
        number, and for an array that all items share.
    results : mapping
        The arrays that it writes, by field.
    sizes : mapping
        The numbers, by field.
    batch : tuple of int
        One record for each item. An array has these axes before the item's own, or 1, or fewer.
    tasks, threads : int
        Tasks of an item; threads at most.
    zeros : frozenset of str
        Results that must be zeros before.
    summed : mapping
        Results that come in parts.
    """

    compile: Callable[..., Any]
    kind: tuple[Any, ...]
    record: Mapping[str, int | None]
    results: Mapping[str, Like]
    sizes: Mapping[str, int] = field(default_factory=dict)
    batch: tuple[int, ...] = ()
    tasks: int = 1
    threads: int = 1
    zeros: frozenset[str] = frozenset()
    summed: Mapping[str, Rows] = field(default_factory=dict)


class Run(Protocol):
    """What a library does with launches."""

    def __call__(self, launch: Launch, operands: Mapping[str, Array | None]) -> dict[str, Array]:
        """Run compiled code: the results by field. An operand that is None, or missing, is the address 0."""
        ...

    def where_any(self, condition: Array, change: Callable[..., Any], given: tuple[Array, ...]) -> Any:
        """`Backend.where_any`, or its place may be taken by a call that is made again with the change."""
        ...


SMALL = 1 << 20  # products and sums, some 10 µs: less than handing work to a thread is worth


def threads_for(products: int) -> int:
    """Threads for a launch of so many products."""
    from subquad_numpy.runtime.threads import thread_count

    return 1 if products < SMALL else thread_count()
