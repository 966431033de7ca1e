"""Descriptions of runs of compiled kernels, made from shapes alone, for a library that compiles them into programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from subquad.backend import Like

Array = Any


class Rows(NamedTuple):
    """A result that the tasks leave in `parts` partial sums (of float64 if `wide`), all of them zero at first.

    The library that runs the launch adds the parts up into the result.
    """

    parts: int
    wide: bool


@dataclass(frozen=True)
class Launch:
    """One run of a compiled kernel on contiguous arrays.

    Attributes
    ----------
    compile : callable
        ``compile(*kind)`` returns the compiled kernel; it is a cached function.
    kind : tuple
        The arguments of `compile`; the first one is the dtype.
    record : mapping
        The fields of an argument record, in order. An array has the number of its last axes that belong to one item; a
        number, or an array that all items share, has None.
    results : mapping
        Shape and dtype of the arrays that the kernel writes, by field.
    sizes : mapping
        The numbers, by field.
    batch : tuple of int
        Batch shape: there is one argument record for each item. Arrays have batch axes that broadcast to it.
    tasks, threads : int
        Tasks of an item; maximum number of threads.
    zeros : frozenset of str
        Results that must be filled with zeros before the run.
    summed : mapping
        Results that come in parts, by field.
    reused : mapping
        Result → operand of its shape and dtype, in whose memory it may be written: the kernel reads each number of the
        operand before it writes that of the result.
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
    reused: Mapping[str, str] = field(default_factory=dict)


class Run(Protocol):
    """How a library runs launches."""

    def __call__(self, launch: Launch, operands: Mapping[str, Array | None]) -> dict[str, Array]:
        """Run the kernel of a launch and return the results by field. A missing operand, or None, is the address 0."""
        ...

    def where_any(self, condition: Array, change: Callable[..., Any], given: tuple[Array, ...]) -> Any:
        """`change(*given)` where the condition holds, else `given`, as `Backend.where_any`.

        A library may also return `given` and repeat the whole call, with the change, where the condition held.
        """
        ...


class GradientRun(Run, Protocol):
    """How a library runs the launches of a gradient.

    Attributes
    ----------
    need : sequence of bool
        Which arrays of the kernel want a gradient.
    """

    need: Sequence[bool]

    def unless(self, condition: Array, compute: Callable[[], Any]) -> Any:
        """`compute()`, or the gradients of the generic form if the condition holds; None where `compute` gives None."""
        ...


def threads_for(products: int) -> int:
    """The number of threads for a launch of so many multiply-adds."""
    from subquad_numpy.runtime.arguments import SMALL
    from subquad_numpy.runtime.threads import thread_count

    return 1 if products < SMALL else thread_count()


def to_shape(xp: ModuleType, grad: Array, shape: tuple[int, ...]) -> Array:
    """A gradient added up over the batch axes that an array of this shape lacks or has once."""
    lacking = grad.ndim - len(shape)
    axes = (
        *range(lacking),
        *(i + lacking for i, size in enumerate(shape) if size == 1 and grad.shape[i + lacking] != 1),
    )
    return xp.reshape(xp.sum(grad, axis=axes), shape) if axes else grad
