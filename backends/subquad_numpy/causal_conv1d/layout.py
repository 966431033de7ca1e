"""What the convolution's kernels read, and which inputs a step sees."""

from typing import Any

from subquad_numpy.codegen import inline
from subquad_numpy.runtime.arguments import Fields

# stored: how x is stored, and y; to the gradient, x, ∂y and ∂x
SIZES = ("n", "d", "width", "block", "reverse", "silu", "stored")
# `weight` is (d, width), to the gradient (width, d) with row k for the input k steps before; bias, initial_state and
# resets may have the address 0
INPUTS = ("x", "weight", "bias", "initial_state", "resets")
HEAD: Fields = dict.fromkeys(SIZES) | dict.fromkeys(INPUTS, 0)


@inline
def sizes_of(f: Any) -> Any:
    """The sizes of arrays and blocks, and the options."""
    return f.n, f.d, f.width, f.block, f.reverse, f.silu


@inline
def place(t: int, n: int, reverse: int) -> int:
    """The row of an array at which step t is."""
    return n - 1 - t if reverse else t


@inline
def seen_before(resets: Any, has: bool, row: int, t: int, n: int, history: int, reverse: int) -> int:
    """How many inputs before its own step t sees, at most `history`; `row` is the item's first row of `resets`."""
    if has:
        for k in range(min(history, t + 1)):
            if resets[row + place(t - k, n, reverse)]:
                return k
    return history


@inline
def seeing_after(resets: Any, has: bool, row: int, t: int, n: int, history: int, reverse: int) -> int:
    """How many steps after step t see its input, at most `history`; steps beyond the end count, t may be negative."""
    if has:
        for k in range(1, history + 1):
            if 0 <= t + k < n and resets[row + place(t + k, n, reverse)]:
                return k - 1
    return history
