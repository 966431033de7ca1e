"""Selective scan: one fused pass over time, channels in vectors, the state in cache.

    h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] u[t],      y[t] = (C[t] · h[t] + D u[t]) silu(z[t])

with 2 Re(C[t] · h[t]) where A is complex. A task is one block of channels of one batch item over one chunk of
time. Tasks share nothing, and the numbers of a channel do not depend on how they are cut. Within a task the
order is time,
vector of channels, state; the state of the block and A stay in cache, as (vectors, d_state, lanes), a complex
matrix as two of them.
"""

from functools import cache
from math import pi
from typing import Any

import numba
import numpy as np

from subquad_numpy._compile import compiled, fingerprint
from subquad_numpy._math import LOG2_E, sigmoid, softplus, split_exp2, split_rotation
from subquad_numpy._simd import add_where_zero, aligned, lanes_of, load, prefetch, shifted, spread, store
from subquad_numpy._tile import clear, field, load_part, row_in, store_part, turn_in, turn_in_rest, turn_out

FRAME = (
    # sizes: B_step and C_step are elements (of a complex number: two) from one batch item to the next, 0
    # where all share one; block is at most the channels of a task, a multiple of the lanes; chunk at most its
    # steps
    *("batch", "n", "d", "groups", "d_state", "block", "chunk"),
    *("B_step", "C_step", "delta_softplus", "reverse"),
    # addresses of contiguous arrays, 0 for none
    *("u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
    # (batch, chunks, d, d_state); both may be the same
    *("initial_state", "state"),
    # y: without it only the state is computed; delta_sum: (batch, chunks, d), the sums of Δ
    *("y", "delta_sum"),
)
"""What a kernel is told, as 64-bit integers in this order."""

ROWS_AHEAD = 4  # rows lie a page or more apart, out of reach for the hardware's own prefetching


@cache
def forward_kernel(dtype: str, is_complex: bool, constant_B: bool, constant_C: bool) -> Any:
    """Compile `forward(first, last, frame)`, which runs tasks first to last - 1.

    There are batch * groups * blocks of a group * chunks tasks; the chunk varies fastest.
    `dtype` is that of real numbers.
    """
    lanes = lanes_of(np.dtype(dtype))
    kind = numba.from_dtype(np.dtype(dtype))
    zero = np.dtype(dtype).type(0)
    parts = 2 if is_complex else 1
    stamp = fingerprint()
    name = f"forward {'complex ' * is_complex}{dtype}{' constant B' * constant_B}{' constant C' * constant_C}"

    @compiled(name, "void(int64, int64, int64[::1])")
    def forward(first: int, last: int, frame: Any) -> None:
        stamp  # noqa: B018  part of the key of the cache on disk
        n, d, groups, d_state, block, chunk = frame[1], frame[2], frame[3], frame[4], frame[5], frame[6]
        B_step, C_step, delta_softplus, reverse = frame[7], frame[8], frame[9], frame[10]
        u, delta, A = field(frame, 11, zero), field(frame, 12, zero), field(frame, 13, zero)
        B, C, D = field(frame, 14, zero), field(frame, 15, zero), field(frame, 16, zero)
        z, delta_bias = field(frame, 17, zero), field(frame, 18, zero)
        initial_state, state = field(frame, 19, zero), field(frame, 20, zero)
        y, delta_sum = field(frame, 21, zero), field(frame, 22, zero)
        has_D, has_z, has_bias, has_state = frame[16] != 0, frame[17] != 0, frame[18] != 0, frame[19] != 0
        has_y, has_sum = frame[21] != 0, frame[22] != 0

        width_of_group = d // groups
        blocks_of_group = -(-width_of_group // block)
        chunks = -(-n // chunk)
        ahead = -ROWS_AHEAD * d if reverse else ROWS_AHEAD * d

        matrix = block * d_state
        buffer = np.empty(9 * matrix + 4 * block + 2 * lanes, kind)
        edge = aligned(buffer)
        hr = shifted(edge, lanes)
        hi = shifted(hr, matrix)
        Ar = shifted(hi, matrix)
        Ai = shifted(Ar, matrix)
        Ai_rest = shifted(Ai, matrix)
        Br = shifted(Ai_rest, matrix)
        Bi = shifted(Br, matrix)
        Cr = shifted(Bi, matrix)
        Ci = shifted(Cr, matrix)
        skip = shifted(Ci, matrix)
        bias = shifted(skip, block)
        time_sum = shifted(bias, block)
        time_rest = shifted(time_sum, block)

        for task in range(first, last):
            part = task // chunks % (groups * blocks_of_group)
            item = task // chunks // (groups * blocks_of_group)
            group = part // blocks_of_group
            c0 = group * width_of_group + part % blocks_of_group * block
            width = min(block, (group + 1) * width_of_group - c0)
            start = task % chunks * chunk
            row_of_A = c0 * d_state * parts
            row_of_state = ((item * chunks + task % chunks) * d + c0) * d_state * parts

            turn_in(A, row_of_A, parts, width, d_state, lanes, LOG2_E, Ar)
            clear(hr, 2 * matrix)
            clear(skip, 4 * block)
            if is_complex:
                turn_in(A, row_of_A + 1, 2, width, d_state, lanes, 0.5 / pi, Ai)
                turn_in_rest(A, row_of_A + 1, 2, width, d_state, lanes, 0.5 / pi, Ai, Ai_rest)
            if constant_B:
                turn_in(B, row_of_A, parts, width, d_state, lanes, 1.0, Br)
                if is_complex:
                    turn_in(B, row_of_A + 1, 2, width, d_state, lanes, 1.0, Bi)
            if constant_C:
                turn_in(C, row_of_A, parts, width, d_state, lanes, 1.0, Cr)
                if is_complex:
                    turn_in(C, row_of_A + 1, 2, width, d_state, lanes, 1.0, Ci)
            if has_state:
                turn_in(initial_state, row_of_state, parts, width, d_state, lanes, 1.0, hr)
                if is_complex:
                    turn_in(initial_state, row_of_state + 1, 2, width, d_state, lanes, 1.0, hi)
            if has_D:
                row_in(D, c0, width, lanes, skip)
            if has_bias:
                row_in(delta_bias, c0, width, lanes, bias)

            for t in range(start, min(n, start + chunk)):
                time = n - 1 - t if reverse else t
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
                    if is_complex:
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
                    if has_sum:  # compensated: chunks are long
                        term = step - load(time_rest, at)
                        longer = load(time_sum, at) + term
                        store(time_rest, at, (longer - load(time_sum, at)) - term)
                        store(time_sum, at, longer)

            turn_out(state, row_of_state, parts, width, d_state, lanes, hr)
            if is_complex:
                turn_out(state, row_of_state + 1, 2, width, d_state, lanes, hi)
            if has_sum:
                for i in range(width):
                    delta_sum[(item * chunks + task % chunks) * d + c0 + i] = time_sum[i]
        buffer[0] = 0  # see `aligned`

    return forward
