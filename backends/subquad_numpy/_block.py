"""What the scan's kernels begin with: the head of a frame, the place of a block, its matrices in scratch memory."""

from math import pi
from typing import Any

from subquad_numpy._simd import inline, shifted
from subquad_numpy._tile import field, turn_in, turn_in_rest

HEAD = (
    # sizes: B_step and C_step are elements (of a complex number: two) from one batch item to the next, 0
    # where all share one; block is at most the channels of a task, a multiple of the lanes; chunk at most its
    # steps
    *("batch", "n", "d", "groups", "d_state", "block", "chunk"),
    *("B_step", "C_step", "delta_softplus", "reverse"),
    # addresses of contiguous arrays, 0 for none
    *("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"),
)
"""What every kernel is told first, as 64-bit integers in this order."""


@inline
def sizes_of(frame: Any) -> Any:
    """The words of `HEAD` before the addresses."""
    return (
        *(frame[0], frame[1], frame[2], frame[3], frame[4], frame[5], frame[6]),
        *(frame[7], frame[8], frame[9], frame[10]),
    )


@inline
def inputs_of(frame: Any, zero: Any) -> Any:
    """The addresses of `HEAD` as pointers to numbers of the type of `zero`."""
    return (
        *(field(frame, 11, zero), field(frame, 12, zero), field(frame, 13, zero), field(frame, 14, zero)),
        *(field(frame, 15, zero), field(frame, 16, zero), field(frame, 17, zero), field(frame, 18, zero)),
        field(frame, 19, zero),
    )


@inline
def options_of(frame: Any) -> tuple[bool, bool, bool, bool]:
    """Whether there are D, z, delta_bias and initial_state."""
    return frame[16] != 0, frame[17] != 0, frame[18] != 0, frame[19] != 0


@inline
def locate(place: int, d: int, groups: int, block: int) -> tuple[int, int, int, int, int]:
    """Batch item, group, block of the group, first channel and number of channels of a block."""
    width_of_group = d // groups
    blocks_of_group = -(-width_of_group // block)
    item, part = place // (groups * blocks_of_group), place % (groups * blocks_of_group)
    group, k = part // blocks_of_group, part % blocks_of_group
    c0 = group * width_of_group + k * block
    return item, group, k, c0, min(block, (group + 1) * width_of_group - c0)


@inline
def lay_out(memory: Any, matrix: int) -> Any:
    """Memory for A, with what rounding its imaginary part left, B and C; and what lies behind."""
    Ar = memory
    Ai = shifted(Ar, matrix)
    Ai_rest = shifted(Ai, matrix)
    Br = shifted(Ai_rest, matrix)
    Bi = shifted(Br, matrix)
    Cr = shifted(Bi, matrix)
    Ci = shifted(Cr, matrix)
    return Ar, Ai, Ai_rest, Br, Bi, Cr, Ci, shifted(Ci, matrix)


@inline
def rates_in(
    A: Any, row: int, width: int, d_state: int, lanes: int, scale: float, is_complex: bool, Ar: Any, Ai: Any, rest: Any
) -> None:
    """Copy the rates of a block: the real part times `scale`, the imaginary one in turns per unit of time."""
    turn_in(A, row, 2 if is_complex else 1, width, d_state, lanes, scale, Ar)
    if is_complex:
        turn_in(A, row + 1, 2, width, d_state, lanes, 0.5 / pi, Ai)
        turn_in_rest(A, row + 1, 2, width, d_state, lanes, 0.5 / pi, Ai, rest)


@inline
def matrix_in(matrix: Any, row: int, width: int, d_state: int, lanes: int, is_complex: bool, re: Any, im: Any) -> None:
    """Copy the rows of a block of a constant map or a state."""
    turn_in(matrix, row, 2 if is_complex else 1, width, d_state, lanes, 1.0, re)
    if is_complex:
        turn_in(matrix, row + 1, 2, width, d_state, lanes, 1.0, im)
