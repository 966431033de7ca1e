"""How the scan's kernels begin: they read an argument record, find their block and copy its matrices to scratch."""

from math import pi
from typing import Any

import numpy as np

from subquad_numpy.codegen import inline, pointer, shifted
from subquad_numpy.codegen.copies import load_parted, load_transposed, load_transposed_rest, load_turned
from subquad_numpy.runtime.arguments import Fields

# Numbers of an argument record that need a word:
#     block             maximum channels of a task, a multiple of the lanes
#     chunk             maximum steps of a task of the forward pass
#     tile              steps between two saved states
#     stored            how u, delta, z, B and C are stored (and y, as u): see `codegen.stored`; 0 for the gradient
#     B_step, C_step    stride between batch items in real numbers (a complex number is two); 0 if items share B or C
SIZES = (
    *("batch", "n", "d", "groups", "d_state", "block", "chunk", "tile"),
    *("B_step", "C_step", "delta_softplus", "reverse", "stored"),
)
INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "resets")  # contiguous arrays
HEAD: Fields = dict.fromkeys(SIZES) | dict.fromkeys(INPUTS, 0)
"""The fields that both kernels read: see `runtime.arguments` for record types."""


@inline
def sizes_of(f: Any) -> Any:
    """The numbers of `HEAD`."""
    return (
        *(f.batch, f.n, f.d, f.groups, f.d_state, f.block, f.chunk, f.tile),
        *(f.B_step, f.C_step, f.delta_softplus, f.reverse),
    )


BYTE = np.uint8(0)


@inline
def resets_of(f: Any) -> tuple[Any, bool]:
    """(pointer to a byte for each item and step: not 0 where the state starts anew, whether there are any)."""
    return pointer(f.resets, BYTE), f.resets != 0


@inline
def inputs_of(f: Any, zero: Any) -> Any:
    """The arrays of `HEAD` but `resets` as pointers to numbers of the type of `zero`."""
    return (
        *(pointer(f.u, zero), pointer(f.delta, zero), pointer(f.A, zero), pointer(f.B, zero)),
        *(pointer(f.C, zero), pointer(f.D, zero), pointer(f.z, zero), pointer(f.delta_bias, zero)),
        pointer(f.initial_state, zero),
    )


@inline
def options_of(f: Any) -> tuple[bool, bool, bool, bool]:
    """(has D, has z, has delta_bias, has initial_state): an address of 0 means that there is none."""
    return f.D != 0, f.z != 0, f.delta_bias != 0, f.initial_state != 0


@inline
def locate(place: int, d: int, groups: int, block: int) -> tuple[int, int, int, int, int]:
    """(batch item, group, block of the group, first channel, number of channels) of the block at a `place`."""
    width_of_group = d // groups
    blocks_of_group = -(-width_of_group // block)
    item, part = place // (groups * blocks_of_group), place % (groups * blocks_of_group)
    group, k = part // blocks_of_group, part % blocks_of_group
    c0 = group * width_of_group + k * block
    return item, group, k, c0, min(block, (group + 1) * width_of_group - c0)


@inline
def lay_out(memory: Any, matrix: int) -> Any:
    """Pointers to scratch for A (real part, imaginary part and its rounding error), B and C, and to what follows."""
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
    """Copy the rows of A of a block: the real part times `scale`, the imaginary part in turns per unit of time.

    `rest` takes the rounding errors of the turns, which a long time would multiply.
    """
    if not is_complex:
        load_turned(A, row, width, d_state, lanes, scale, Ar)
    else:
        load_transposed(A, row, 2, width, d_state, lanes, scale, Ar)
        load_transposed(A, row + 1, 2, width, d_state, lanes, 0.5 / pi, Ai)
        load_transposed_rest(A, row + 1, 2, width, d_state, lanes, 0.5 / pi, Ai, rest)


@inline
def find_step(
    t: int, item: int, n: int, d: int, c0: int, groups: int, group: int, numbers: int, B_step: int, C_step: int,
    reverse: int,
) -> tuple[int, int, int, int]:  # fmt: skip
    """(time, where rows of u, of B and of C begin) of step number t of an item; a map has `numbers` real numbers."""
    time = n - 1 - t if reverse else t
    of_maps = (time * groups + group) * numbers
    return time, (item * n + time) * d + c0, item * B_step + of_maps, item * C_step + of_maps


@inline
def place_of_states(f: Any, item: int, tile: int, group: int, c0: int, lanes: int, parts: int) -> tuple[int, int]:
    """(where the states of a block before a tile begin in `checkpoints`, numbers from the real to the imaginary parts).

    A tile of an item holds all real parts, then all imaginary parts, as (vectors of channels, d_state, lanes).
    """
    width = f.d // f.groups
    vectors = -(-width // lanes)
    plane = f.groups * vectors * f.d_state * lanes
    tiles = -(-f.n // f.tile)
    first = group * vectors + (c0 - group * width) // lanes
    return (item * tiles + tile) * parts * plane + first * f.d_state * lanes, plane


@inline
def load_matrix(
    matrix: Any, row: int, width: int, d_state: int, lanes: int, is_complex: bool, re: Any, im: Any
) -> None:
    """Copy the rows of a block of a constant map (B or C) or of a state."""
    if is_complex:
        load_parted(matrix, row, width, d_state, lanes, 1.0, re, im)
    else:
        load_turned(matrix, row, width, d_state, lanes, 1.0, re)
