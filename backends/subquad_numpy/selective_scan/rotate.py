"""One step of the scan for complex states, which turn as they decay: real and imaginary parts lie in two matrices."""

from typing import Any

from subquad_numpy.codegen import inline, load, merged, shifted, spread, store
from subquad_numpy.codegen.side_by_side import scaled_exp2
from subquad_numpy.codegen.stored import StoredRows, asked_rows, padded_rows_of, store_stored_part, stored_as
from subquad_numpy.codegen.vector_math import scaled_rotation
from subquad_numpy.selective_scan.recurrence import open_run


@inline
def rows_by_pairs(memory: Any, stored: int, row: int, width: int, whole: int, lanes: int, scratch: Any) -> StoredRows:
    """One row as rows of two vectors of channels, `whole` numbers in all."""
    start, _, kind = padded_rows_of(memory, stored, row, 0, 1, width, whole, lanes, scratch)
    return start, 2 * lanes, kind


@merged
def read_step(
    delta: Any, u: Any, z: Any, y: Any, stored: int, row: int, ahead: int, width: int, lanes: int, scratch: Any,
    bias: Any, has_z: bool, softplus: bool, slopes_too: bool, steps: Any, inputs: Any, gates: Any, slopes: Any,
    gate_slopes: Any,
) -> None:  # fmt: skip
    """Write Δ, u and silu(z) of one step; if asked, also the slopes of the softplus and of silu.

    Rows that lie `ahead` are prefetched. `scratch` has room for three rows, in whole pairs of vectors.
    """
    both = 2 * lanes
    pairs = (width + both - 1) // both
    whole, place = pairs * both, row + ahead
    of_u, of_delta, of_z = stored_as(stored, 0), stored_as(stored, 1), stored_as(stored, 2)
    rows = rows_by_pairs(delta, of_delta, row, width, whole, lanes, scratch)
    values = rows_by_pairs(u, of_u, row, width, whole, lanes, shifted(scratch, whole))
    opened = rows
    if has_z:
        opened = rows_by_pairs(z, of_z, row, width, whole, lanes, shifted(scratch, 2 * whole))
    asked = (
        asked_rows(delta, of_delta, place, both),
        asked_rows(u, of_u, place, both),
        asked_rows(z, of_z, place, both),
        asked_rows(y, of_u, place, both),
    )
    open_run(
        pairs, both, lanes, rows, values, opened, True, asked, (bias, both), has_z, softplus, slopes_too, False, steps,
        inputs, gates, slopes, gate_slopes, gates, gates,
    )  # fmt: skip


@merged
def rotate(
    vectors: int, lanes: int, d_state: int, width: int, steps: Any, inputs: Any, gates: Any, skip: Any, hr: Any,
    hi: Any, Ar: Any, Ai: Any, Ai_rest: Any, B: Any, Br: Any, Bi: Any, constant_B: bool, C: Any, Cr: Any, Ci: Any,
    constant_C: bool, y: Any, stored: int, row: int, edge: Any, has_y: bool, has_z: bool,
) -> None:  # fmt: skip
    """Take all states one step on, and write y."""
    for v in range(vectors):
        at = v * lanes
        step, x = load(steps, at), load(inputs, at)
        drive = step * x
        out = x * load(skip, at) * 0.5  # the sum is doubled below, for 2 Re(C · h), and D u must not be
        for s in range(d_state):
            i = at * d_state + s * lanes
            b = load(Br, i) if constant_B else spread(B, 2 * s)
            c = load(Cr, i) if constant_C else spread(C, 2 * s)
            b_i = load(Bi, i) if constant_B else spread(B, 2 * s + 1)
            c_i = load(Ci, i) if constant_C else spread(C, 2 * s + 1)
            power, rest = scaled_exp2((step * load(Ar, i),))
            a, a_i = scaled_rotation(rest, step, load(Ai, i), load(Ai_rest, i))
            h, h_i = load(hr, i) * power, load(hi, i) * power
            h, h_i = h + ((a * h - a_i * h_i) + drive * b), h_i + ((a * h_i + a_i * h) + drive * b_i)
            store(hr, i, h)
            store(hi, i, h_i)
            out = out + h * c - h_i * c_i
        out = out * 2.0
        if has_z:
            out = out * load(gates, at)
        if has_y:
            store_stored_part(y, stored, row + at, out, width - at, lanes, edge)
