"""The selective scan: one fused pass over time, channels in vectors, the state in cache.

    h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] u[t],      y[t] = (C[t] · h[t] + D u[t]) silu(z[t])

with 2 Re(C[t] · h[t]) in place of C[t] · h[t] where A is complex, and 0 in place of h[t-1] at a reset. A task is one
block of channels of one batch item, over one chunk of time. Tasks share nothing, and the result for a channel does not
depend on the width of blocks. Within a task the loops are over tiles of time, pairs of vectors of channels, a few
states at a time, and steps (see `advance`); for complex states over steps, vectors, and states (see `rotate`). State
and A of the block stay in cache, each as (vectors, d_state, lanes); a complex matrix is two of these.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import aligned, copy, pointer, shifted
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row, store_joined, store_turned
from subquad_numpy.codegen.stored import asked_rows, rows_of, stored_as
from subquad_numpy.codegen.vector_math import LOG2_E
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.selective_scan.advance import NOTES, STEP, advance, note_tile, noted, sum_steps, write_tile
from subquad_numpy.selective_scan.four import ENOUGH
from subquad_numpy.selective_scan.layout import (
    HEAD,
    find_step,
    inputs_of,
    lay_out,
    load_matrix,
    load_rates,
    locate,
    options_of,
    place_of_states,
    resets_of,
    sizes_of,
)
from subquad_numpy.selective_scan.recurrence import find_gaps
from subquad_numpy.selective_scan.rotate import read_step, rotate

# Results of a scan:
#     state        (batch, chunks, d, d_state), the state after each chunk; initial_state has this shape too, and may
#                  be the same memory
#     y            (batch, n, d), or address 0: then only states are computed
#     delta_sum    (batch, chunks, d), the sums of Δ over each chunk, or address 0
#     checkpoints  the states before each `tile` steps, for the gradient, or address 0: see `place_of_states`
FORWARD_RECORD = fields(HEAD, {"state": 0, "y": 0, "delta_sum": 0, "checkpoints": 0})

# How many steps ahead rows are prefetched for complex states: they lie a page or more apart, out of reach of the
# hardware's prefetching. For real states it is one tile.
ROWS_AHEAD = 4


@cache
def forward_kernel(dtype: str, is_complex: bool, constant_B: bool, constant_C: bool) -> Any:
    """Compile `forward(first, last, records)`, which runs tasks first to last - 1.

    There are batch * groups * blocks of a group * chunks tasks; the chunk varies fastest.
    """
    lanes, kind, zero = element(dtype)
    parts = 2 if is_complex else 1
    name = f"selective scan {'complex ' * is_complex}{dtype}{' constant B' * constant_B}{' constant C' * constant_C}"

    @compiled(name, FORWARD_RECORD)
    def forward(first_task: int, last_task: int, records: Any) -> int:
        f = records[0]
        _, n, d, groups, d_state, block, chunk, tile, B_step, C_step, delta_softplus, reverse = sizes_of(f)
        u, delta, A, B, C, D, z, delta_bias, initial_state = inputs_of(f, zero)
        has_D, has_z, has_bias, has_state = options_of(f)
        resets, has_resets = resets_of(f)
        state, y, delta_sum = pointer(f.state, zero), pointer(f.y, zero), pointer(f.delta_sum, zero)
        checkpoints = pointer(f.checkpoints, zero)
        has_y, has_sum, saves = f.y != 0, f.delta_sum != 0, f.checkpoints != 0

        chunks = -(-n // chunk)
        sign = -1 if reverse else 1
        of_row, of_maps = sign * d, sign * groups * d_state * parts  # from one step of time to the next

        pairs = -(-block // (2 * lanes))
        rows = pairs * 2 * lanes  # of a row in scratch: vectors of channels go by pairs
        matrix = rows * d_state
        of_rows, of_tile = (8 * rows, 0) if is_complex else (0, tile)
        buffer = np.empty(
            9 * matrix + 7 * rows + of_rows + of_tile * (2 * d_state + 2 * (NOTES + 3) * lanes) + 3 * lanes, kind
        )
        edge = aligned(buffer)
        # hr, hi: the state, real and imaginary part; skip: D; time_sum, time_rest: the sum of Δ and its rounding error
        hr = shifted(edge, lanes)
        hi = shifted(hr, matrix)
        Ar, Ai, Ai_rest, Br, Bi, Cr, Ci, skip = lay_out(shifted(hi, matrix), matrix)
        bias = shifted(skip, rows)
        time_sum = shifted(bias, rows)
        time_rest = shifted(time_sum, rows)
        bases = shifted(time_rest, rows)
        gaps = shifted(bases, rows)
        even = shifted(gaps, rows)
        steps = shifted(even, rows)  # of complex states: Δ, u and the gate of one step
        inputs = shifted(steps, of_rows // 8)
        gates = shifted(inputs, of_rows // 8)
        notes = shifted(steps, of_rows)  # of real states: see `advance`
        pairs_here = shifted(gates, of_rows // 8) if is_complex else shifted(notes, 2 * of_tile * NOTES * lanes)
        maps = shifted(notes, 2 * of_tile * (NOTES + 3) * lanes)  # rows of B and C, if they are in half precision

        for task in range(first_task, last_task):
            item, group, _, c0, width = locate(task // chunks, d, groups, block)
            start = task % chunks * chunk
            row_of_A = c0 * d_state * parts
            row_of_state = ((item * chunks + task % chunks) * d + c0) * d_state * parts

            clear(skip, 7 * rows)
            load_rates(A, row_of_A, width, d_state, lanes, LOG2_E, is_complex, Ar, Ai, Ai_rest)
            vectors = -(-width // lanes)
            if not is_complex:
                find_gaps(Ar, vectors, d_state, lanes, bases, gaps, even)
            if constant_B:
                load_matrix(B, row_of_A, width, d_state, lanes, is_complex, Br, Bi)
            if constant_C:
                load_matrix(C, row_of_A, width, d_state, lanes, is_complex, Cr, Ci)
            if not has_state:
                clear(hr, parts * matrix)
            else:
                load_matrix(initial_state, row_of_state, width, d_state, lanes, is_complex, hr, hi)
            if has_D:
                load_padded_row(D, c0, width, lanes, skip)
            if has_bias:
                load_padded_row(delta_bias, c0, width, lanes, bias)

            stop = min(n, start + chunk)
            for k in range(start // tile, -(-stop // tile)):
                first = max(start, k * tile)
                length = min(stop, (k + 1) * tile) - first
                if saves and first == k * tile:
                    place, plane = place_of_states(f, item, k, group, c0, lanes, parts)
                    for p in range(parts):
                        there = shifted(checkpoints, place + p * plane)
                        copy(shifted(hr, p * matrix), vectors * d_state * lanes, there)
                time, row, row_of_B, row_of_C = find_step(
                    first, item, n, d, c0, groups, group, d_state * parts, B_step, C_step, reverse
                )
                first_reset = shifted(resets, item * n + time)
                if is_complex:
                    for i in range(length):
                        if has_resets and first_reset[i * sign] != 0:
                            clear(hr, 2 * matrix)
                        here = row + i * of_row
                        read_step(
                            delta, u, z, y, f.stored, here, ROWS_AHEAD * of_row, width, lanes, pairs_here, bias, has_z,
                            delta_softplus != 0, False, steps, inputs, gates, gates, gates,
                        )  # fmt: skip
                        rotate(
                            vectors, lanes, d_state, width, steps, inputs, gates, skip, hr, hi, Ar, Ai, Ai_rest,
                            shifted(B, row_of_B + i * of_maps), Br, Bi, constant_B,
                            shifted(C, row_of_C + i * of_maps), Cr, Ci, constant_C, y, stored_as(f.stored, 0), here,
                            edge, has_y, has_z,
                        )  # fmt: skip
                        if has_sum:
                            for at in range(0, width, lanes):
                                sum_steps(shifted(steps, at), 0, 1, shifted(time_sum, at), shifted(time_rest, at))
                    continue
                B_now, C_now = (Br, 0), (Cr, 0)
                if not constant_B:
                    B_now = rows_of(B, stored_as(f.stored, 3), row_of_B, of_maps, length, d_state, lanes, maps)
                if not constant_C:
                    second = shifted(maps, tile * d_state)
                    C_now = rows_of(C, stored_as(f.stored, 4), row_of_C, of_maps, length, d_state, lanes, second)
                for pair in range(0, width, 2 * lanes):
                    here, left, j = row + pair, min(width - pair, 2 * lanes), pair * d_state
                    place = here + tile * of_row
                    asked = (
                        asked_rows(delta, stored_as(f.stored, 1), place, of_row),
                        asked_rows(u, stored_as(f.stored, 0), place, of_row),
                        asked_rows(y, stored_as(f.stored, 0), place, of_row),
                        asked_rows(z, stored_as(f.stored, 2), place, of_row),
                    )
                    note_tile(
                        notes, length, delta, u, z, f.stored, here, of_row, left, lanes, pairs_here,
                        shifted(bias, pair), shifted(skip, pair), shifted(bases, pair), shifted(gaps, pair),
                        even[pair] != 0 or even[pair + lanes] != 0, has_z, delta_softplus != 0, d_state < ENOUGH, asked,
                    )  # fmt: skip
                    advance(
                        notes, NOTES * 2 * lanes, length, lanes, d_state, (left + lanes - 1) // lanes,
                        shifted(even, pair), shifted(hr, j), shifted(Ar, j), shifted(B_now[0], j if constant_B else 0),
                        B_now[1], constant_B, shifted(C_now[0], j if constant_C else 0), C_now[1], constant_C,
                        first_reset, sign, has_resets, True, asked,
                    )  # fmt: skip
                    if has_y:
                        write_tile(
                            notes, length, lanes, y, stored_as(f.stored, 0), here, of_row, left, pairs_here, has_z
                        )
                    if has_sum:
                        for k in range(0, left, lanes):
                            at, now = pair + k, shifted(noted(notes, STEP, lanes), k)
                            pitch = NOTES * 2 * lanes
                            sum_steps(now, pitch, length, shifted(time_sum, at), shifted(time_rest, at))

            if is_complex:
                store_joined(state, row_of_state, width, d_state, lanes, hr, hi)
            else:
                store_turned(state, row_of_state, width, d_state, lanes, hr)
            if has_sum:
                for i in range(width):
                    delta_sum[(item * chunks + task % chunks) * d + c0 + i] = time_sum[i]
        return DONE

    return forward
