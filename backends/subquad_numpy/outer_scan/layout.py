"""How the kernels of the scan find their arrays, and what they prepare for a block of time."""

from typing import Any, NamedTuple

from subquad_numpy.codegen import inline, load, replace_where_zero, shifted, store, zeros
from subquad_numpy.codegen.copies import load_part, turn
from subquad_numpy.codegen.stored import load_stored_part, number_at, stored_as
from subquad_numpy.codegen.vector_math import LOG2_E, ONE, split_exp2
from subquad_numpy.outer_scan.tile import NEAR, PLAIN, RESET
from subquad_numpy.runtime.arguments import Fields

# Strides in elements: `_item` of the batch, `_step` of time, `_head` of the heads (of q and k: of the groups). Those of
# the initial state are for the scan; to the gradient it comes contiguous.
SIZES = ("batch", "n", "groups", "heads", "d", "d_v", "reverse", "stored")
STRIDES = (
    *("q_item", "q_step", "q_head", "k_item", "k_step", "k_head", "v_item", "v_step", "v_head"),
    *("g_item", "g_step", "g_head", "weight_item", "weight_step", "weight_head"),
    *("state_item", "state_head", "state_row", "state_column"),
    *("bonus_item", "skip_head", "skip_column", "resets_item", "resets_step"),
)
INPUTS = ("q", "k", "v", "g", "weight", "bonus", "skip", "initial_state", "resets")
HEAD: Fields = dict.fromkeys((*SIZES, *STRIDES)) | dict.fromkeys(INPUTS, 0)
"""The fields that the kernels read: see `runtime.arguments` for record types. `stored` tells how the arrays over time
are stored, in the order of `Kinds`; behind them, to the gradient, how the gradients by q, k, v, g and weight are."""

BLOCK = 32  # steps of a block of time: what they read of q, k and v stays in the first cache


class Kinds(NamedTuple):
    """How the arrays over time are stored; `o` is the output, or the gradient by it."""

    q: int
    k: int
    v: int
    g: int
    weight: int
    o: int


@inline
def kinds_of(word: int) -> Any:
    """How arrays are stored that are listed in a word in the order of `Kinds`."""
    return Kinds(
        stored_as(word, 0), stored_as(word, 1), stored_as(word, 2), stored_as(word, 3), stored_as(word, 4),
        stored_as(word, 5),
    )  # fmt: skip


@inline
def along(stride: int, n: int, reverse: int) -> tuple[int, int]:
    """(elements from the first row in memory to the first step, elements from one step to the next)."""
    return ((n - 1) * stride, -stride) if reverse != 0 else (0, stride)


@inline
def load_state(
    matrix: Any, row: int, column: int, d: int, columns: int, lanes: int, edge: Any, S: Any, pitch: int
) -> None:
    """Copy a panel of the initial state, whose strides are `row` and `column`, to rows `pitch` apart, 0 beyond them.

    One of the strides is 1. A transposed matrix goes by tiles.
    """
    if column <= 1:  # 0 for a single column
        for r in range(d):
            for c in range(0, columns, lanes):
                store(S, r * pitch + c, load_part(matrix, r * row + c, columns - c, lanes, edge))
    else:
        whole, tiles = columns // lanes * lanes, d // lanes * lanes
        for c in range(0, whole, lanes):
            for r in range(0, tiles, lanes):
                source, target = shifted(matrix, c * column + r), shifted(S, r * pitch + c)
                turn(source, source, column, target, target, pitch)
        for r in range(d):
            for c in range(whole if r < tiles else 0, -(-columns // lanes) * lanes):
                S[r * pitch + c] = matrix[r * row + c * column] if c < columns else 0


@inline
def decays_of_head(
    g: Any, stored: int, at: int, step: int, count: int, lanes: int, factor: Any, whole: Any, mode: Any
) -> None:
    """Write factor and mode of `count` steps, for one decay a step; `whole` is scratch."""
    padded = -(-count // lanes) * lanes
    for i in range(padded):
        factor[i] = number_at(g, stored, at + i * step) if i < count else 0
    for i in range(0, padded, lanes):
        value, power = split_exp2(load(factor, i) * LOG2_E)
        store(factor, i, value)
        store(whole, i, power)
    for i in range(count):
        mode[i] = NEAR if whole[i] == 0 else PLAIN


@inline
def decays_of_channels(
    g: Any, stored: int, at: int, step: int, count: int, d: int, lanes: int, width: int, edge: Any, factor: Any,
    keep: Any, mode: Any,
) -> None:  # fmt: skip
    """Write factor and keep, `width` elements for each of `count` steps, and mode 0."""
    for i in range(count):
        mode[i] = PLAIN
        row = at + i * step
        for c in range(0, d, lanes):
            value, power = split_exp2(load_stored_part(g, stored, row + c, d - c, lanes, edge) * LOG2_E)
            store(factor, i * width + c, value)
            store(keep, i * width + c, replace_where_zero(power, zeros(edge), ONE(power)))


@inline
def cut_at_resets(resets: Any, at: int, step: int, count: int, width: int, factor: Any, mode: Any) -> None:
    """Mark the steps before which the state starts from 0; their factors, `width` of each step, become 0."""
    for i in range(count):
        if resets[at + i * step] != 0:
            mode[i] = RESET
            for c in range(width):
                factor[i * width + c] = 0
