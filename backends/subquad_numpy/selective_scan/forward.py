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
from numba import carray

from subquad_numpy.codegen import add_where_zero, aligned, load, pointer, prefetch, shifted, spread, store
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row, load_part, store_joined, store_part, store_turned
from subquad_numpy.codegen.vector_math import LOG2_E, sigmoid, softplus, split_exp2, split_rotation
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.selective_scan.layout import (
    HEAD,
    inputs_of,
    lay_out,
    load_matrix,
    load_rates,
    locate,
    options_of,
    resets_of,
    sizes_of,
)

# Results of a scan:
#     state        (batch, chunks, d, d_state), the state after each chunk; initial_state has this shape too, and may
#                  be the same memory
#     y            (batch, n, d), or address 0: then only states are computed
#     delta_sum    (batch, chunks, d), the sums of Δ over each chunk, or address 0
FORWARD_RECORD = fields(HEAD, {"state": 0, "y": 0, "delta_sum": 0})

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
        _, n, d, groups, d_state, block, chunk, B_step, C_step, delta_softplus, reverse = sizes_of(f)
        u, delta, A, B, C, D, z, delta_bias, initial_state = inputs_of(f, zero)
        has_D, has_z, has_bias, has_state = options_of(f)
        resets, has_resets = resets_of(f)
        state, y, delta_sum = pointer(f.state, zero), pointer(f.y, zero), pointer(f.delta_sum, zero)
        has_y, has_sum = f.y != 0, f.delta_sum != 0

        chunks = -(-n // chunk)
        ahead = -ROWS_AHEAD * d if reverse else ROWS_AHEAD * d

        matrix = block * d_state
        buffer = np.empty(9 * matrix + 4 * block + 2 * lanes, kind)
        edge = aligned(buffer)
        # hr, hi: the state, real and imaginary part; skip: D; time_sum, time_rest: the sum of Δ and its rounding error
        hr = shifted(edge, lanes)
        hi = shifted(hr, matrix)
        Ar, Ai, Ai_rest, Br, Bi, Cr, Ci, skip = lay_out(shifted(hi, matrix), matrix)
        bias = shifted(skip, block)
        time_sum = shifted(bias, block)
        time_rest = shifted(time_sum, block)

        for task in range(first, last):
            item, group, _, c0, width = locate(task // chunks, d, groups, block)
            start = task % chunks * chunk
            row_of_A = c0 * d_state * parts
            row_of_state = ((item * chunks + task % chunks) * d + c0) * d_state * parts

            clear(hr, 2 * matrix)
            clear(skip, 4 * block)
            load_rates(A, row_of_A, width, d_state, lanes, LOG2_E, is_complex, Ar, Ai, Ai_rest)
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
                time = n - 1 - t if reverse else t
                if has_resets and resets[item * n + time] != 0:
                    clear(hr, 2 * matrix)
                row = (item * n + time) * d + c0
                row_of_B = item * B_step + (time * groups + group) * d_state * parts
                row_of_C = item * C_step + (time * groups + group) * d_state * parts
                for v in range(-(-width // lanes)):
                    at = v * lanes
                    count = width - at
                    prefetch(delta, row + at + ahead)
                    prefetch(u, row + at + ahead)
                    prefetch(z, row + at + ahead)
                    step = load_part(delta, row + at, count, lanes, edge) + load(bias, at)
                    if delta_softplus:
                        step = softplus(step)
                    x = load_part(u, row + at, count, lanes, edge)
                    drive = step * x
                    out = x * load(skip, at)
                    if is_complex:  # the sum is doubled below, for 2 Re(C · h), and D u must not be
                        out = out * 0.5
                    for s in range(d_state):
                        i = at * d_state + s * lanes
                        b = load(Br, i) if constant_B else spread(B, row_of_B + s * parts)
                        c = load(Cr, i) if constant_C else spread(C, row_of_C + s * parts)
                        factor, whole = split_exp2(step * load(Ar, i))
                        if is_complex:
                            b_i = load(Bi, i) if constant_B else spread(B, row_of_B + s * parts + 1)
                            c_i = load(Ci, i) if constant_C else spread(C, row_of_C + s * parts + 1)
                            a, a_i = split_rotation(factor, whole, step, load(Ai, i), load(Ai_rest, i))
                            h, h_i = load(hr, i), load(hi, i)
                            next_h = add_where_zero(whole, (a * h - a_i * h_i) + drive * b, h)
                            next_h_i = add_where_zero(whole, (a * h_i + a_i * h) + drive * b_i, h_i)
                            store(hi, i, next_h_i)
                            out = out + next_h * c - next_h_i * c_i
                        else:
                            h = load(hr, i)
                            next_h = add_where_zero(whole, factor * h + drive * b, h)
                            out = out + next_h * c
                        store(hr, i, next_h)
                    if is_complex:
                        out = out * 2.0
                    if has_z:
                        gate = load_part(z, row + at, count, lanes, edge)
                        out = out * (gate * sigmoid(gate))
                    if has_y:
                        store_part(y, row + at, out, count, lanes, edge)
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
