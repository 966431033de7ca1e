"""What the scan's kernels begin with: the head of a frame, the place of a block, its matrices in scratch memory."""

from math import pi
from typing import Any

from subquad_numpy.codegen import inline, pointer, shifted
from subquad_numpy.codegen.copies import load_transposed, load_transposed_rest
from subquad_numpy.runtime.arguments import Fields

# B_step and C_step are elements (of a complex number: two) from one batch item to the next, 0 where all share one;
# block is at most the channels of a task, a multiple of the lanes; chunk at most its steps
SIZES = ("batch", "n", "d", "groups", "d_state", "block", "chunk", "B_step", "C_step", "delta_softplus", "reverse")
INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")  # contiguous arrays
HEAD: Fields = dict.fromkeys(SIZES) | dict.fromkeys(INPUTS, 0)
"""What every kernel is told: see `runtime.arguments` for what a record type is."""


@inline
def sizes_of(f: Any) -> Any:
    """The numbers of `HEAD`."""
    return (
        *(f.batch, f.n, f.d, f.groups, f.d_state, f.block, f.chunk),
        *(f.B_step, f.C_step, f.delta_softplus, f.reverse),
    )


@inline
def inputs_of(f: Any, zero: Any) -> Any:
    """The addresses of `HEAD` as pointers to numbers of the type of `zero`."""
    return (
        *(pointer(f.u, zero), pointer(f.delta, zero), pointer(f.A, zero), pointer(f.B, zero)),
        *(pointer(f.C, zero), pointer(f.D, zero), pointer(f.z, zero), pointer(f.delta_bias, zero)),
        pointer(f.initial_state, zero),
    )


@inline
def options_of(f: Any) -> tuple[bool, bool, bool, bool]:
    """Whether there are D, z, delta_bias and initial_state."""
    return f.D != 0, f.z != 0, f.delta_bias != 0, f.initial_state != 0


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
def load_rates(
    A: Any, row: int, width: int, d_state: int, lanes: int, scale: float, is_complex: bool, Ar: Any, Ai: Any, rest: Any
) -> None:
    """Copy the rates of a block: the real part times `scale`, the imaginary one in turns per unit of time."""
    load_transposed(A, row, 2 if is_complex else 1, width, d_state, lanes, scale, Ar)
    if is_complex:
        load_transposed(A, row + 1, 2, width, d_state, lanes, 0.5 / pi, Ai)
        load_transposed_rest(A, row + 1, 2, width, d_state, lanes, 0.5 / pi, Ai, rest)


@inline
def load_matrix(
    matrix: Any, row: int, width: int, d_state: int, lanes: int, is_complex: bool, re: Any, im: Any
) -> None:
    """Copy the rows of a block of a constant map or a state."""
    load_transposed(matrix, row, 2 if is_complex else 1, width, d_state, lanes, 1.0, re)
    if is_complex:
        load_transposed(matrix, row + 1, 2, width, d_state, lanes, 1.0, im)
