"""Copies between arrays and scratch memory: the edges of blocks, and matrices transposed to have channels innermost.

A (channels, d_state) matrix of a block lies in scratch memory as (vectors, d_state, lanes). Real and imaginary part
of a complex matrix are copied one after the other: then `stride` is 2 and `index` counts real numbers. `edge` is
scratch memory for one vector, through which the last, incomplete vector of a row goes.
"""

from typing import Any

from subquad_numpy.codegen import inline, load, store


@inline
def load_part(memory: Any, index: int, count: int, lanes: int, edge: Any) -> Any:
    """The vector at `index`; lanes from `count` on are 0, and their memory is not touched."""
    if count < lanes:
        for lane in range(lanes):
            edge[lane] = memory[index + lane] if lane < count else 0
        return load(edge, 0)
    return load(memory, index)


@inline
def store_part(memory: Any, index: int, value: Any, count: int, lanes: int, edge: Any) -> None:
    """Write the first `count` lanes of `value` to `index`."""
    if count < lanes:
        store(edge, 0, value)
        for lane in range(count):
            memory[index + lane] = edge[lane]
    else:
        store(memory, index, value)


@inline
def load_transposed(
    matrix: Any, index: int, stride: int, width: int, d_state: int, lanes: int, scale: float, scratch: Any
) -> None:
    """Copy `width` rows of a matrix, times `scale`, into `scratch`; lanes without a row become 0."""
    for c in range(-(-width // lanes) * lanes):
        place = c // lanes * d_state * lanes + c % lanes
        for s in range(d_state):
            scratch[place + s * lanes] = matrix[index + (c * d_state + s) * stride] * scale if c < width else 0.0


@inline
def load_transposed_rest(
    matrix: Any,
    index: int,
    stride: int,
    width: int,
    d_state: int,
    lanes: int,
    scale: float,
    scratch: Any,
    rest: Any,
) -> None:
    """Copy into `rest` the rounding errors of `load_transposed`: exact products less those in `scratch`."""
    for c in range(-(-width // lanes) * lanes):
        place = c // lanes * d_state * lanes + c % lanes
        for s in range(d_state):
            exact = matrix[index + (c * d_state + s) * stride] * scale if c < width else 0.0
            rest[place + s * lanes] = exact - scratch[place + s * lanes]


@inline
def store_transposed(matrix: Any, index: int, stride: int, width: int, d_state: int, lanes: int, scratch: Any) -> None:
    """Copy `scratch` back into `width` rows of a matrix."""
    for c in range(width):
        place = c // lanes * d_state * lanes + c % lanes
        for s in range(d_state):
            matrix[index + (c * d_state + s) * stride] = scratch[place + s * lanes]


@inline
def load_padded_row(row: Any, index: int, width: int, lanes: int, scratch: Any) -> None:
    """Copy a row of one number per channel; lanes beyond `width` become 0."""
    for c in range(-(-width // lanes) * lanes):
        scratch[c] = row[index + c] if c < width else 0


@inline
def clear(scratch: Any, size: int) -> None:
    """Write zeros to the first `size` numbers of `scratch`."""
    for i in range(size):
        scratch[i] = 0


@inline
def copy(source: Any, size: int, target: Any) -> None:
    """Copy `size` numbers from `source` to `target`."""
    for i in range(size):
        target[i] = source[i]
