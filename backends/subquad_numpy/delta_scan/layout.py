"""What both kernels of the delta rule read: sizes and arrays, and where the rows of a task stand."""

from typing import Any, NamedTuple

import numpy as np

from subquad_numpy.codegen import inline, pointer
from subquad_numpy.codegen.stored import stored_as
from subquad_numpy.runtime.arguments import Fields

SIZES = ("n", "heads", "d", "d_v", "reverse", "stored")
INPUTS = ("q", "k", "v", "g", "beta", "a", "b", "initial_state", "resets")  # contiguous arrays
HEAD: Fields = dict.fromkeys(SIZES) | dict.fromkeys(("numbers", *INPUTS), 0)
"""The fields that both kernels read; `numbers` holds the scale. `stored` tells how inputs and output are stored, in the
order of `Kinds`; behind them, to the gradient, how the gradients by the inputs are."""

BLOCK = 32  # steps of time whose decays and widened rows are in scratch; no vector has more lanes


class Arrays(NamedTuple):
    """Pointers to the inputs; those that are not given are never followed."""

    q: Any
    k: Any
    v: Any
    g: Any
    beta: Any
    a: Any
    b: Any
    resets: Any


class Kinds(NamedTuple):
    """How the arrays over time are stored; `o` is the output, or the gradient by it."""

    q: int
    k: int
    v: int
    g: int
    beta: int
    a: int
    b: int
    o: int


class Task(NamedTuple):
    """A head of a batch item: its first row, the rows from one step to the next, and so for the marks of resets.

    Row r of an array with rows of w numbers starts at r w.
    """

    row: int
    forth: int
    mark: int
    mark_forth: int


@inline
def arrays_of(f: Any, zero: Any) -> Any:
    """The inputs as pointers to numbers of the type of `zero`; marks of resets are bytes."""
    return Arrays(
        pointer(f.q, zero), pointer(f.k, zero), pointer(f.v, zero), pointer(f.g, zero), pointer(f.beta, zero),
        pointer(f.a, zero), pointer(f.b, zero), pointer(f.resets, np.uint8(0)),
    )  # fmt: skip


@inline
def kinds_of(word: int) -> Any:
    """How arrays are stored that are listed in a word in the order of `Kinds`."""
    return Kinds(
        stored_as(word, 0), stored_as(word, 1), stored_as(word, 2), stored_as(word, 3),
        stored_as(word, 4), stored_as(word, 5), stored_as(word, 6), stored_as(word, 7),
    )  # fmt: skip


@inline
def task_of(item: int, head: int, n: int, heads: int, reverse: int) -> Any:
    """The rows of a head of a batch item, in the order in which time runs."""
    row, mark = item * n * heads + head, item * n
    if reverse != 0:
        return Task(row + (n - 1) * heads, -heads, mark + n - 1, -1)
    return Task(row, heads, mark, 1)
