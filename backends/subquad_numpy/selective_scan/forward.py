"""The selective scan: one fused pass over time, channels in vectors, the state in cache.

    h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] u[t],      y[t] = (C[t] · h[t] + D u[t]) silu(z[t])

with 2 Re(C[t] · h[t]) in place of C[t] · h[t] where A is complex, and 0 in place of h[t-1] at a reset. A task is one
block of channels of one batch item, over one chunk of time. Tasks share nothing, and the result for a channel does not
depend on the width of blocks. Within a task the loops are over time, vectors of channels, and states. State and A of
the block stay in cache, each as (vectors, d_state, lanes); a complex matrix is two of these.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import aligned, carray, copy, load, pointer, shifted, spread, store
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row, store_joined, store_turned
from subquad_numpy.codegen.side_by_side import scaled_exp2
from subquad_numpy.codegen.stored import prefetch_stored, row_of, store_stored_part, stored_as
from subquad_numpy.codegen.vector_math import LOG2_E, scaled_rotation
from subquad_numpy.runtime.arguments import fields
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
from subquad_numpy.selective_scan.recurrence import advance, find_gaps, read_step, start_powers

# Results of a scan:
#     state        (batch, chunks, d, d_state), the state after each chunk; initial_state has this shape too, and may
#                  be the same memory
#     y            (batch, n, d), or address 0: then only states are computed
#     delta_sum    (batch, chunks, d), the sums of Δ over each chunk, or address 0
#     checkpoints  the states before each `tile` steps, for the gradient, or address 0: see `place_of_states`
FORWARD_RECORD = fields(HEAD, {"state": 0, "y": 0, "delta_sum": 0, "checkpoints": 0})

# How many steps ahead rows are prefetched: they lie a page or more apart, out of reach of the hardware's prefetching.
ROWS_AHEAD = 4


@cache
def forward_kernel(dtype: str, is_complex: bool, constant_B: bool, constant_C: bool) -> Any:
    """Compile `forward(first, last, records)`, which runs tasks first to last - 1.

    There are batch * groups * blocks of a group * chunks tasks; the chunk varies fastest.
    """
    lanes, kind, zero = element(dtype)
    parts = 2 if is_complex else 1
    name = f"forward {'complex ' * is_complex}{dtype}{' constant B' * constant_B}{' constant C' * constant_C}"

    @compiled(name, FORWARD_RECORD)
    def forward(first: int, last: int, records: Any) -> int:
        f = carray(records, 1)[0]
        _, n, d, groups, d_state, block, chunk, tile, B_step, C_step, delta_softplus, reverse = sizes_of(f)
        u, delta, A, B, C, D, z, delta_bias, initial_state = inputs_of(f, zero)
        has_D, has_z, has_bias, has_state = options_of(f)
        resets, has_resets = resets_of(f)
        state, y, delta_sum = pointer(f.state, zero), pointer(f.y, zero), pointer(f.delta_sum, zero)
        checkpoints = pointer(f.checkpoints, zero)
        has_y, has_sum, saves = f.y != 0, f.delta_sum != 0, f.checkpoints != 0

        chunks = -(-n // chunk)
        ahead = -ROWS_AHEAD * d if reverse else ROWS_AHEAD * d

        pairs = -(-block // (2 * lanes))
        rows = pairs * 2 * lanes  # of a row in scratch: vectors of channels go by pairs
        matrix = rows * d_state
        buffer = np.empty(9 * matrix + 14 * rows + 2 * d_state + 2 * lanes, kind)
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
        steps = shifted(even, rows)  # Δ, u, the gate and what `first_power` gives, of one step
        inputs = shifted(steps, rows)
        gates = shifted(inputs, rows)
        factors = shifted(gates, rows)
        ratios = shifted(factors, rows)
        mores = shifted(ratios, rows)
        kepts = shifted(mores, rows)
        maps = shifted(kepts, rows)  # B and C of one step, if they are stored in half precision

        for task in range(first, last):
            item, group, _, c0, width = locate(task // chunks, d, groups, block)
            start = task % chunks * chunk
            row_of_A = c0 * d_state * parts
            row_of_state = ((item * chunks + task % chunks) * d + c0) * d_state * parts

            clear(hr, 2 * matrix)
            clear(skip, 7 * rows)
            load_rates(A, row_of_A, width, d_state, lanes, LOG2_E, is_complex, Ar, Ai, Ai_rest)
            vectors = -(-width // lanes)
            if not is_complex:
                find_gaps(Ar, vectors, d_state, lanes, bases, gaps, even)
            if constant_B:
                load_matrix(B, row_of_A, width, d_state, lanes, is_complex, Br, Bi)
            if constant_C:
                load_matrix(C, row_of_A, width, d_state, lanes, is_complex, Cr, Ci)
            if has_state:
                load_matrix(initial_state, row_of_state, width, d_state, lanes, is_complex, hr, hi)
            if has_D:
                load_padded_row(D, c0, width, lanes, skip)
            if has_bias:
                load_padded_row(delta_bias, c0, width, lanes, bias)

            for t in range(start, min(n, start + chunk)):
                time, row, row_of_B, row_of_C = find_step(
                    t, item, n, d, c0, groups, group, d_state * parts, B_step, C_step, reverse
                )
                if saves and t % tile == 0:
                    place, plane = place_of_states(f, item, t // tile, group, c0, lanes, parts)
                    for p in range(parts):
                        there = shifted(checkpoints, place + p * plane)
                        copy(shifted(hr, p * matrix), vectors * d_state * lanes, there)
                if has_resets and resets[item * n + time] != 0:
                    clear(hr, 2 * matrix)
                for v in range(vectors):
                    at = v * lanes
                    prefetch_stored(delta, stored_as(f.stored, 1), row + at + ahead)
                    prefetch_stored(u, stored_as(f.stored, 0), row + at + ahead)
                    prefetch_stored(z, stored_as(f.stored, 2), row + at + ahead)
                read_step(
                    delta, u, z, f.stored, row, width, lanes, edge, bias, has_z, delta_softplus != 0, False, steps,
                    inputs, gates, gates, gates,
                )  # fmt: skip
                B_now, C_now = shifted(B, row_of_B), shifted(C, row_of_C)
                if not is_complex:
                    if not constant_B:
                        B_now = row_of(B, stored_as(f.stored, 3), row_of_B, d_state, lanes, maps)
                    if not constant_C:
                        C_now = row_of(C, stored_as(f.stored, 4), row_of_C, d_state, lanes, shifted(maps, d_state))
                    start_powers(steps, bases, gaps, even, width, lanes, factors, ratios, mores, kepts)
                for v in range(vectors):
                    at = v * lanes
                    count = width - at
                    step, x = load(steps, at), load(inputs, at)
                    drive = step * x
                    out = x * load(skip, at)
                    if is_complex:
                        out = out * 0.5  # the sum is doubled below, for 2 Re(C · h), and D u must not be
                        for s in range(d_state):
                            i = at * d_state + s * lanes
                            b = load(Br, i) if constant_B else spread(B, row_of_B + 2 * s)
                            c = load(Cr, i) if constant_C else spread(C, row_of_C + 2 * s)
                            b_i = load(Bi, i) if constant_B else spread(B, row_of_B + 2 * s + 1)
                            c_i = load(Ci, i) if constant_C else spread(C, row_of_C + 2 * s + 1)
                            power, rest = scaled_exp2((step * load(Ar, i),))
                            a, a_i = scaled_rotation(rest, step, load(Ai, i), load(Ai_rest, i))
                            h, h_i = load(hr, i) * power, load(hi, i) * power
                            h, h_i = h + ((a * h - a_i * h_i) + drive * b), h_i + ((a * h_i + a_i * h) + drive * b_i)
                            store(hr, i, h)
                            store(hi, i, h_i)
                            out = out + h * c - h_i * c_i
                    else:
                        out = advance(
                            hr, at, d_state, lanes, step, drive, out, Ar, B_now, 0, Br, constant_B, C_now, 0, Cr,
                            constant_C, even[at] != 0, factors, ratios, mores, kepts,
                        )  # fmt: skip
                    if is_complex:
                        out = out * 2.0
                    if has_z:
                        out = out * load(gates, at)
                    if has_y:
                        store_stored_part(y, stored_as(f.stored, 0), row + at, out, count, lanes, edge)
                    if has_sum:  # Kahan's compensated sum, since a chunk may be long
                        term = step - load(time_rest, at)
                        longer = load(time_sum, at) + term
                        store(time_rest, at, (longer - load(time_sum, at)) - term)
                        store(time_sum, at, longer)

            if is_complex:
                store_joined(state, row_of_state, width, d_state, lanes, hr, hi)
            else:
                store_turned(state, row_of_state, width, d_state, lanes, hr)
            if has_sum:
                for i in range(width):
                    delta_sum[(item * chunks + task % chunks) * d + c0 + i] = time_sum[i]
        buffer[0] = 0  # see `aligned`
        return DONE

    return forward
