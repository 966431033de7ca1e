"""What the kernels of the fixed scan read, and what stands in the way of a step."""

from typing import Any

from subquad_numpy.codegen import inline
from subquad_numpy.codegen.copies import load_parted, load_turned
from subquad_numpy.runtime.arguments import Fields

# block: channels of a task, a multiple of the lanes; mask_step: numbers from item to item, 0 for one row that all share
# stored: how u is stored, and y; to the gradient, u, ∂y and ∂u
SIZES = ("n", "d", "d_state", "block", "reverse", "mask_step", "stored")
INPUTS = ("u", "rate", "B", "C", "D", "initial_state", "resets", "mask")  # contiguous arrays
HEAD: Fields = dict.fromkeys(SIZES) | dict.fromkeys(INPUTS, 0)
TILE = 32  # steps that go through the registers for one state after the other

PADDED, ANEW = 1, 2  # of a step's code, which is 0 for a plain step


@inline
def sizes_of(f: Any) -> Any:
    """The sizes of arrays and blocks, and the direction of time."""
    return f.n, f.d, f.d_state, f.block, f.reverse


@inline
def place(t: int, n: int, reverse: int) -> int:
    """The row of an array at which step t is."""
    return n - 1 - t if reverse else t


@inline
def read_codes(f: Any, resets: Any, mask: Any, item: int, start: int, count: int, codes: Any) -> None:
    """Write the codes of `count` steps from `start` on: whether the step is padded, and the state starts anew."""
    for i in range(count):
        row = place(start + i, f.n, f.reverse)
        code = 0
        if f.resets != 0 and resets[item * f.n + row]:
            code += ANEW
        if f.mask != 0 and not mask[item * f.mask_step + row]:
            code += PADDED
        codes[i] = code


@inline
def load_parts(
    matrix: Any, row: int, width: int, d_state: int, lanes: int, parts: int, scale: float, real: Any, imag: Any
) -> None:
    """Copy rows of a real or complex (channels, d_state) matrix, times `scale`, channels innermost."""
    if parts == 2:
        load_parted(matrix, row, width, d_state, lanes, scale, real, imag)
    else:
        load_turned(matrix, row, width, d_state, lanes, scale, real)
