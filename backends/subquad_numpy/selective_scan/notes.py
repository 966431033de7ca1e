"""The notes of the gradient: what a step of two vectors of channels gives to all states, and what these give to it."""

from typing import Any

from subquad_numpy.codegen import add_up, inline, load, shifted, split, store, zeros
from subquad_numpy.codegen.copies import store_part
from subquad_numpy.codegen.stored import Rows, padded_rows_of
from subquad_numpy.codegen.vector_math import LOG2_E
from subquad_numpy.runtime.stored import AS_COMPUTED
from subquad_numpy.selective_scan.advance import DRIVE, FACTOR, KEPT, MORE, OUT, RATIO, STEP, noted
from subquad_numpy.selective_scan.recurrence import open_run, start_powers

LN_2 = 1 / LOG2_E
INPUT, SLOPE, GATE_SLOPE, G, ALONG_A, ALONG_B = range(KEPT + 1, KEPT + 7)  # the notes of the gradient alone
NOTES = ALONG_B + 1
# G is the gradient by C · h + D u; ALONG_A is Σ_s A ∂x, ALONG_B is Σ_s B G


@split
def note_tile(
    notes: Any, length: int, delta: Any, u: Any, z: Any, grad_y: Any, row: int, row_step: int, width: int, lanes: int,
    scratch: Any, bias: Any, skip: Any, bases: Any, gaps: Any, is_even: bool, has_z: bool, softplus: bool, asks: bool,
    asked: tuple[Rows, Rows, Rows, Rows],
) -> None:  # fmt: skip
    """Write the notes of the gradient for two vectors of channels, or for one if `width` has no more.

    If it `asks`, the rows of `asked` are prefetched.
    """
    both = 2 * lanes
    pitch = NOTES * both
    size = length * both
    rows = padded_rows_of(delta, AS_COMPUTED, row, row_step, length, width, both, lanes, scratch)
    values = padded_rows_of(u, AS_COMPUTED, row, row_step, length, width, both, lanes, shifted(scratch, size))
    grads = padded_rows_of(grad_y, AS_COMPUTED, row, row_step, length, width, both, lanes, shifted(scratch, 2 * size))
    opened = rows
    if has_z:
        opened = padded_rows_of(z, AS_COMPUTED, row, row_step, length, width, both, lanes, shifted(scratch, 3 * size))
    steps, inputs, drives = noted(notes, STEP, lanes), noted(notes, INPUT, lanes), noted(notes, DRIVE, lanes)
    factors, ratios, gates = noted(notes, FACTOR, lanes), noted(notes, RATIO, lanes), drives  # drives come later
    outs, gs, gate_slopes = noted(notes, OUT, lanes), noted(notes, G, lanes), noted(notes, GATE_SLOPE, lanes)
    along_A, along_B, none = noted(notes, ALONG_A, lanes), noted(notes, ALONG_B, lanes), zeros(notes)
    open_run(
        length, pitch, lanes, rows, values, opened, asks, asked, (bias, 0), has_z, softplus, True, False, steps, inputs,
        gates, noted(notes, SLOPE, lanes), gate_slopes, skip, outs,
    )  # fmt: skip
    if is_even:
        start_powers(
            length, pitch, lanes, steps, bases, gaps, factors, ratios, noted(notes, MORE, lanes),
            noted(notes, KEPT, lanes),
        )  # fmt: skip
    for i in range(length):
        for k in range(0, both, lanes):
            at = i * pitch + k
            x, g = load(inputs, at), load(grads[0], i * grads[1] + k)
            if has_z:
                store(gate_slopes, at, g * load(gate_slopes, at))
                g = g * load(gates, at)
                store(outs, at, x * load(skip, k))
            store(gs, at, g)
            store(drives, at, load(steps, at) * x)
            store(along_A, at, none)
            store(along_B, at, none)


@split
def write_tile(
    notes: Any, length: int, lanes: int, row: int, row_step: int, count: int, edge: Any, skip: Any, has_z: bool,
    softplus: bool, grad_u: Any, grad_delta: Any, grad_z: Any, sum_bias: Any, sum_D: Any,
) -> None:  # fmt: skip
    """Write the gradients by the inputs of one vector, and add up those by its bias and D."""
    to_bias, to_D = zeros(notes), zeros(notes)
    for i in range(length):
        at = row + i * row_step
        if count >= lanes:  # no question then for each number that is written
            by_delta, by_D = _write_step(
                notes, i, lanes, at, lanes, edge, skip, has_z, softplus, grad_u, grad_delta, grad_z
            )
        else:
            by_delta, by_D = _write_step(
                notes, i, lanes, at, count, edge, skip, has_z, softplus, grad_u, grad_delta, grad_z
            )
        to_bias, to_D = to_bias + by_delta, to_D + by_D
    add_up(sum_bias, 0, to_bias)
    add_up(sum_D, 0, to_D)


@inline
def _write_step(
    notes: Any, i: int, lanes: int, row: int, count: int, edge: Any, skip: Any, has_z: bool, softplus: bool,
    grad_u: Any, grad_delta: Any, grad_z: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Write the gradients by the inputs of step i of one vector; (∂Δ, what D gets)."""
    note = shifted(notes, i * NOTES * 2 * lanes)
    x, along_B = load(note, INPUT * 2 * lanes), load(note, ALONG_B * 2 * lanes)
    step, g = load(note, STEP * 2 * lanes), load(note, G * 2 * lanes)
    store_part(grad_u, row, g * skip + step * along_B, count, lanes, edge)
    to_delta = load(note, ALONG_A * 2 * lanes) * LN_2 + x * along_B
    if softplus:
        to_delta = to_delta * load(note, SLOPE * 2 * lanes)
    store_part(grad_delta, row, to_delta, count, lanes, edge)
    if has_z:
        grad = load(note, GATE_SLOPE * 2 * lanes) * load(note, OUT * 2 * lanes)
        store_part(grad_z, row, grad, count, lanes, edge)
    return to_delta, g * x
