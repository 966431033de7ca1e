"""Copies between arrays and scratch memory: the edges of blocks, and matrices transposed to have channels innermost.

A (channels, d_state) matrix of a block lies in scratch memory as (vectors, d_state, lanes). Real and imaginary part
of a complex matrix are copied one after the other: then `stride` is 2 and `index` counts real numbers. `edge` is
scratch memory for one vector, through which the last, incomplete vector of a row goes.
"""

from typing import Any

from subquad_numpy.codegen import inline, load, shifted, split, store
from subquad_numpy.codegen.turn import turn_tile

turn, part_tile, join_tile = turn_tile(False, False), turn_tile(False, True), turn_tile(True, False)


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


@split
def turn_matrix(matrix: Any, index: int, width: int, d_state: int, lanes: int, scratch: Any) -> None:
    """`load_transposed` of a real matrix of the type of `scratch`, by tiles."""
    whole, tiles = width // lanes * lanes, d_state // lanes * lanes
    for c in range(0, whole, lanes):
        for s in range(0, tiles, lanes):
            source, target = shifted(matrix, index + c * d_state + s), shifted(scratch, c * d_state + s * lanes)
            turn(source, source, d_state, target, target, lanes)
    for c in range(whole if tiles == d_state else 0, -(-width // lanes) * lanes):
        place = c // lanes * d_state * lanes + c % lanes
        for s in range(tiles if c < whole else 0, d_state):
            scratch[place + s * lanes] = matrix[index + c * d_state + s] if c < width else 0.0


@inline
def load_turned(matrix: Any, index: int, width: int, d_state: int, lanes: int, scale: float, scratch: Any) -> None:
    """`turn_matrix`, times `scale`: one function of a kernel turns matrices of all scales."""
    turn_matrix(matrix, index, width, d_state, lanes, scratch)
    if scale != 1.0:
        for i in range(0, -(-width // lanes) * lanes * d_state, lanes):
            store(scratch, i, load(scratch, i) * scale)


@split
def load_parted(
    matrix: Any, index: int, width: int, d_state: int, lanes: int, scale: float, real: Any, imag: Any
) -> None:
    """`load_turned` of a complex matrix, its real and imaginary parts apart."""
    whole, half = width // lanes * lanes, lanes // 2
    tiles = d_state // half * half
    for c in range(0, whole, lanes):
        for s in range(0, tiles, half):
            source, at = shifted(matrix, index + (c * d_state + s) * 2), c * d_state + s * lanes
            part_tile(source, source, 2 * d_state, shifted(real, at), shifted(imag, at), lanes)
    for c in range(whole if tiles == d_state else 0, -(-width // lanes) * lanes):
        place = c // lanes * d_state * lanes + c % lanes
        for s in range(tiles if c < whole else 0, d_state):
            at = index + (c * d_state + s) * 2
            real[place + s * lanes] = matrix[at] if c < width else 0.0
            imag[place + s * lanes] = matrix[at + 1] if c < width else 0.0
    if scale != 1.0:
        for i in range(0, -(-width // lanes) * lanes * d_state, lanes):
            store(real, i, load(real, i) * scale)
            store(imag, i, load(imag, i) * scale)


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
def store_turned(matrix: Any, index: int, width: int, d_state: int, lanes: int, scratch: Any) -> None:
    """`store_transposed` to a real matrix of the type of `scratch`, by tiles."""
    whole, tiles = width // lanes * lanes, d_state // lanes * lanes
    for c in range(0, whole, lanes):
        for s in range(0, tiles, lanes):
            source, target = shifted(scratch, c * d_state + s * lanes), shifted(matrix, index + c * d_state + s)
            turn(source, source, lanes, target, target, d_state)
    for c in range(whole if tiles == d_state else 0, width):
        place = c // lanes * d_state * lanes + c % lanes
        for s in range(tiles if c < whole else 0, d_state):
            matrix[index + c * d_state + s] = scratch[place + s * lanes]


@inline
def store_joined(matrix: Any, index: int, width: int, d_state: int, lanes: int, real: Any, imag: Any) -> None:
    """`store_turned` to a complex matrix, from its real and imaginary parts."""
    whole, half = width // lanes * lanes, lanes // 2
    tiles = d_state // half * half
    for c in range(0, whole, lanes):
        for s in range(0, tiles, half):
            target, at = shifted(matrix, index + (c * d_state + s) * 2), c * d_state + s * lanes
            join_tile(shifted(real, at), shifted(imag, at), lanes, target, target, 2 * d_state)
    for c in range(whole if tiles == d_state else 0, width):
        place = c // lanes * d_state * lanes + c % lanes
        for s in range(tiles if c < whole else 0, d_state):
            at = index + (c * d_state + s) * 2
            matrix[at] = real[place + s * lanes]
            matrix[at + 1] = imag[place + s * lanes]


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
