"""What one run of compiled code does, as a pure function of shapes and dtypes says it: what another caller needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from subquad.backend import Like


@dataclass(frozen=True)
class Launch:
    """One run of a compiled kernel on arrays whose numbers lie one after the other, last axis fastest.

    The kernel is ``make(*kind)``, code behind the C function ``code(first, last, record)`` that runs the tasks first …
    last − 1 and returns `codegen.compile.DONE`, or another number where it found no memory. Any threads may run any
    tasks, in any order. The record is one int64 for each name of `fields`:

    ========================  ==============================================================================
    a name in `operands`      address of the array at that place of the arguments; 0 where that is None
    a name in `outputs`       address of that output
    a name in `summed` too    address of zeros, `rows` times as large as the output, where a row is what the
                              output is; afterwards the output is the sum over rows. `wide`: of float64
    a name in `sizes`         that number
    any other                 0
    ========================  ==============================================================================

    Attributes
    ----------
    name : str
        Names `make`: with `kind` it says which code runs.
    make : callable
        Compiles, once a process and kind; gives a `codegen.compile.Kernel` with its `address`.
    kind : tuple
        Arguments of `make`; the first is the name of the dtype of real numbers.
    fields : tuple of str
        Names of the numbers of the record, in order.
    operands : mapping
        Name → place among the arguments of `launch`.
    outputs : mapping
        Name → shape and dtype of what the run writes, in order: the kernel's outputs, or for `launch_backward` a
        gradient for each array that was given.
    sizes : mapping
        Name → number.
    tasks : int
        How many tasks there are.
    threads : int
        How many threads are worth their while; at least 1.
    summed : mapping
        Name → (rows, wide).
    zeroed : frozenset of str
        Outputs that must be zeros before the run.
    """

    name: str
    make: Callable[..., Any]
    kind: tuple[Any, ...]
    fields: tuple[str, ...]
    operands: Mapping[str, int]
    outputs: Mapping[str, Like]
    sizes: Mapping[str, int]
    tasks: int
    threads: int
    summed: Mapping[str, tuple[int, bool]] = field(default_factory=dict)
    zeroed: frozenset[str] = frozenset()
