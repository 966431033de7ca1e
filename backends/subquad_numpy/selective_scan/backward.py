"""The gradient of the selective scan: states are computed again from checkpoints, one tile of time after the other.

Let g be the gradient of C · h + D u, G[t] the gradient of h[t], and x = Δ A. Then

    G[t] = C[t] g[t] + exp(x[t+1]) G[t+1],        ∂x[t] = exp(x[t]) h[t-1] G[t]
    ∂B[t] = Σ_c Δ u G,    ∂C[t] = Σ_c g h,    ∂A = Σ_t Δ ∂x,    ∂Δ = Σ_s (A ∂x + u B G),    ∂u = D g + Σ_s Δ B G

At a reset of step t, 0 stands for h[t-1], and for exp(x[t]) G[t] in G[t-1].

The gradient by a complex number is ∂/∂Re + i ∂/∂Im of the real loss, as in PyTorch; JAX uses its conjugate.
"""

from functools import cache
from math import pi
from typing import Any

import numpy as np
from numba import carray

from subquad_numpy.codegen import aligned, load, pointer, prefetch, shifted, spread, store, total, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, copy, load_padded_row, load_part, store_part, store_transposed
from subquad_numpy.codegen.side_by_side import scaled_exp2
from subquad_numpy.codegen.vector_math import LOG2_E, scaled_rotation
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.selective_scan.forward import ROWS_AHEAD
from subquad_numpy.selective_scan.layout import (
    HEAD,
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

# Arrays of the argument record. What the kernel reads has the shapes of y, state; what it writes has these shapes:
#     OF_ROWS      the shapes of u, delta, z, initial_state
#     OVER_TIME    (batch, d, d_state), (batch, d), (batch, d): sums over time of each batch item, in float64
#     OF_MAPS      (blocks of a group, batch, n, groups, d_state) from each block of channels; a constant map as A
OF_OUTPUTS, OF_ROWS = ("grad_y", "grad_state"), ("grad_u", "grad_delta", "grad_z", "grad_initial_state")
OVER_TIME = ("grad_A", "grad_D", "grad_delta_bias")
OF_MAPS = ("grad_B", "grad_C")
BACKWARD_RECORD = fields(HEAD, dict.fromkeys((*OF_OUTPUTS, *OF_ROWS, *OVER_TIME, *OF_MAPS, "checkpoints"), 0))
"""The argument record of a gradient kernel; `checkpoints` are those of the forward pass, or address 0."""


LN_2 = 1 / LOG2_E


@cache
def backward_kernel(dtype: str, is_complex: bool, constant_B: bool, constant_C: bool) -> Any:
    """Compile `backward(first, last, records)`: tasks first to last - 1 of batch * groups * blocks."""
    lanes, kind, zero = element(dtype)
    zero64 = np.float64(0)
    parts = 2 if is_complex else 1
    name = f"backward {'complex ' * is_complex}{dtype}{' constant B' * constant_B}{' constant C' * constant_C}"

    @compiled(name, BACKWARD_RECORD)
    def backward(first: int, last: int, records: Any) -> int:
        f = carray(records, 1)[0]
        batch, n, d, groups, d_state, block, _, tile, B_step, C_step, delta_softplus, reverse = sizes_of(f)
        u, delta, A, B, C, D, z, delta_bias, initial_state = inputs_of(f, zero)
        has_D, has_z, has_bias, has_state = options_of(f)
        resets, has_resets = resets_of(f)
        grad_y, grad_state = pointer(f.grad_y, zero), pointer(f.grad_state, zero)
        grad_u, grad_delta = pointer(f.grad_u, zero), pointer(f.grad_delta, zero)
        grad_z, grad_initial_state = pointer(f.grad_z, zero), pointer(f.grad_initial_state, zero)
        grad_A, grad_D, grad_bias = (
            pointer(f.grad_A, zero64),
            pointer(f.grad_D, zero64),
            pointer(f.grad_delta_bias, zero64),
        )
        grad_B, grad_C = pointer(f.grad_B, zero), pointer(f.grad_C, zero)
        grad_B64, grad_C64 = pointer(f.grad_B, zero64), pointer(f.grad_C, zero64)

        saved, has_saved = pointer(f.checkpoints, zero), f.checkpoints != 0

        tiles = -(-n // tile)
        swept = 0 if has_saved else tiles - 1  # tiles whose states a first sweep finds
        ahead = -ROWS_AHEAD * d if reverse else ROWS_AHEAD * d

        # Sizes in scratch: a row of the block, in whole pairs of vectors; a real matrix, a real or complex one; one
        # vector for each state.
        rows = -(-block // (2 * lanes)) * 2 * lanes
        matrix = rows * d_state
        planes = parts * matrix
        row_sums = d_state * lanes
        buffer = np.empty(
            (9 + tile) * matrix + (6 + 2 * tile + swept) * planes + 4 * row_sums + (12 + 5 * tile) * rows + 2 * lanes,
            kind,
        )
        edge = aligned(buffer)
        # Gr and Gi hold exp(x[t+1]) G[t+1], real and imaginary part
        Ar, Ai, Ai_rest, Br, Bi, Cr, Ci, Gr = lay_out(shifted(edge, lanes), matrix)
        Gi = shifted(Gr, matrix)
        tile_A = shifted(Gi, matrix)  # sums over the tile
        tile_B = shifted(tile_A, planes)
        tile_C = shifted(tile_B, planes)
        checkpoints = shifted(tile_C, planes)  # the state before each tile, or before the first one
        states = shifted(checkpoints, (swept + 1) * planes)  # the state before the tile, and after each of its steps
        powers = shifted(states, (tile + 1) * planes)  # the decays of each step of the tile: see `scaled_exp2`
        rests = shifted(powers, tile * matrix)
        nothing = shifted(rests, tile * planes)  # the state before a step with a reset
        row_B = shifted(nothing, planes)  # sums over the channels of one step
        row_C = shifted(row_B, 2 * row_sums)
        skip = shifted(row_C, 2 * row_sums)
        bias = shifted(skip, rows)
        tile_D = shifted(bias, rows)
        tile_bias = shifted(tile_D, rows)
        bases = shifted(tile_bias, rows)
        gaps = shifted(bases, rows)
        even = shifted(gaps, rows)
        inputs = shifted(even, rows)
        factors = shifted(inputs, rows)
        ratios = shifted(factors, rows)
        mores = shifted(ratios, rows)
        kepts = shifted(mores, rows)
        steps = shifted(kepts, rows)  # Δ of each step of the tile
        gates = shifted(steps, tile * rows)  # silu(z), and its slope
        gate_slopes = shifted(gates, tile * rows)
        slopes = shifted(gate_slopes, tile * rows)  # of the softplus
        outs = shifted(slopes, tile * rows)  # y before its gate
        sums = np.empty(6 * matrix + 2 * rows + 8, np.float64)  # sums over all tiles
        sum_A = aligned(sums)
        sum_B = shifted(sum_A, 2 * matrix)
        sum_C = shifted(sum_B, 2 * matrix)
        sum_D = shifted(sum_C, 2 * matrix)
        sum_bias = shifted(sum_D, rows)
        clear(nothing, planes)

        for task in range(first, last):
            item, group, block_of_group, c0, width = locate(task, d, groups, block)
            vectors = -(-width // lanes)
            row_of_A = c0 * d_state * parts
            row_of_state = (item * d + c0) * d_state * parts

            clear(checkpoints, planes)
            clear(skip, 7 * rows)
            clear(tile_A, 3 * planes)
            clear(sum_A, 6 * matrix + 2 * rows)
            load_rates(A, row_of_A, width, d_state, lanes, LOG2_E, is_complex, Ar, Ai, Ai_rest)
            if not is_complex:
                find_gaps(Ar, vectors, d_state, lanes, bases, gaps, even)
            load_matrix(grad_state, row_of_state, width, d_state, lanes, is_complex, Gr, Gi)
            if constant_B:
                load_matrix(B, row_of_A, width, d_state, lanes, is_complex, Br, Bi)
            if constant_C:
                load_matrix(C, row_of_A, width, d_state, lanes, is_complex, Cr, Ci)
            if has_state:
                imaginary = shifted(checkpoints, matrix)
                load_matrix(initial_state, row_of_state, width, d_state, lanes, is_complex, checkpoints, imaginary)
            if has_D:
                load_padded_row(D, c0, width, lanes, skip)
            if has_bias:
                load_padded_row(delta_bias, c0, width, lanes, bias)

            # If no states are saved, the first sweeps go forward and only fill the checkpoints. The others go back over
            # all tiles, compute the states of a tile again, and then walk the tile from its end.
            for sweep in range(swept + tiles):
                k = sweep if sweep < swept else swept + tiles - 1 - sweep
                start = k * tile
                length = min(n - start, tile)
                if has_saved:
                    place, plane = place_of_states(f, item, k, group, c0, lanes, parts)
                    for p in range(parts):
                        copy(shifted(saved, place + p * plane), vectors * d_state * lanes, shifted(states, p * matrix))
                else:
                    copy(shifted(checkpoints, k * planes), planes, states)
                for i in range(length):
                    time = n - 1 - (start + i) if reverse else start + i
                    row = (item * n + time) * d + c0
                    row_of_B = item * B_step + (time * groups + group) * d_state * parts
                    row_of_C = item * C_step + (time * groups + group) * d_state * parts
                    anew = has_resets and resets[item * n + time] != 0
                    before = nothing if anew else shifted(states, i * planes)
                    after = shifted(states, (i + 1) * planes)
                    powers_now, rests_now = shifted(powers, i * matrix), shifted(rests, i * planes)
                    steps_now = shifted(steps, i * rows)
                    for v in range(vectors):
                        prefetch(delta, row + v * lanes + ahead)
                        prefetch(u, row + v * lanes + ahead)
                        prefetch(z, row + v * lanes + ahead)
                    read_step(
                        delta, u, z, row, width, lanes, edge, bias, has_z, delta_softplus != 0, True, steps_now, inputs,
                        shifted(gates, i * rows), shifted(slopes, i * rows), shifted(gate_slopes, i * rows),
                    )  # fmt: skip
                    if not is_complex:
                        start_powers(steps_now, bases, gaps, even, width, lanes, factors, ratios, mores, kepts)
                    for v in range(vectors):
                        at = v * lanes
                        step, x = load(steps_now, at), load(inputs, at)
                        drive = step * x
                        out = x * load(skip, at)
                        if is_complex:
                            out = out * 0.5
                            for s in range(d_state):
                                j = at * d_state + s * lanes
                                b = load(Br, j) if constant_B else spread(B, row_of_B + 2 * s)
                                c = load(Cr, j) if constant_C else spread(C, row_of_C + 2 * s)
                                b_i = load(Bi, j) if constant_B else spread(B, row_of_B + 2 * s + 1)
                                c_i = load(Ci, j) if constant_C else spread(C, row_of_C + 2 * s + 1)
                                scale, rest = scaled_exp2((step * load(Ar, j),))
                                a, a_i = scaled_rotation(rest, step, load(Ai, j), load(Ai_rest, j))
                                h, h_i = load(before, j) * scale, load(before, matrix + j) * scale
                                next_h = h + ((a * h - a_i * h_i) + drive * b)
                                next_h_i = h_i + ((a * h_i + a_i * h) + drive * b_i)
                                store(powers_now, j, scale)
                                store(rests_now, j, a)
                                store(rests_now, matrix + j, a_i)
                                store(after, j, next_h)
                                store(after, matrix + j, next_h_i)
                                out = out + next_h * c - next_h_i * c_i
                            out = out * 2.0
                        else:
                            out = advance(
                                before, after, at, d_state, lanes, step, drive, out, Ar, B, row_of_B, Br, constant_B, C,
                                row_of_C, Cr, constant_C, even[at] != 0, factors, ratios, mores, kepts, True,
                                powers_now, rests_now,
                            )  # fmt: skip
                        store(outs, i * rows + at, out)
                if sweep < swept:
                    copy(shifted(states, length * planes), planes, shifted(checkpoints, (k + 1) * planes))
                    continue

                for i in range(length - 1, -1, -1):
                    time = n - 1 - (start + i) if reverse else start + i
                    row = (item * n + time) * d + c0
                    row_of_B = item * B_step + (time * groups + group) * d_state * parts
                    row_of_C = item * C_step + (time * groups + group) * d_state * parts
                    anew = has_resets and resets[item * n + time] != 0
                    before = nothing if anew else shifted(states, i * planes)
                    after = shifted(states, (i + 1) * planes)
                    powers_now, rests_now = shifted(powers, i * matrix), shifted(rests, i * planes)
                    clear(row_B, 4 * row_sums)
                    for v in range(vectors):
                        at = v * lanes
                        count = width - at
                        prefetch(grad_y, row + at - ahead)
                        step = load(steps, i * rows + at)
                        x = load_part(u, row + at, count, lanes, edge)
                        g = load_part(grad_y, row + at, count, lanes, edge)
                        if has_z:
                            slope = load(gate_slopes, i * rows + at)
                            store_part(grad_z, row + at, g * load(outs, i * rows + at) * slope, count, lanes, edge)
                            g = g * load(gates, i * rows + at)
                        store(tile_D, at, load(tile_D, at) + g * x)
                        drive = step * x
                        g2 = g + g
                        along_A, along_B = zeros(edge), zeros(edge)
                        for s in range(d_state):
                            j = at * d_state + s * lanes
                            lane = s * lanes
                            power = load(powers_now, j)
                            b = load(Br, j) if constant_B else spread(B, row_of_B + s * parts)
                            c = load(Cr, j) if constant_C else spread(C, row_of_C + s * parts)
                            if is_complex:
                                b_i = load(Bi, j) if constant_B else spread(B, row_of_B + s * parts + 1)
                                c_i = load(Ci, j) if constant_C else spread(C, row_of_C + s * parts + 1)
                                G, G_i = load(Gr, j) + g2 * c, load(Gi, j) - g2 * c_i
                                a, a_i = load(rests_now, j), load(rests_now, matrix + j)
                                h, h_i = load(before, j), load(before, matrix + j)
                                kept, kept_i = G * power, G_i * power
                                w = kept + (a * kept + a_i * kept_i)
                                w_i = kept_i + (a * kept_i - a_i * kept)
                                X, X_i = h * w + h_i * w_i, h * w_i - h_i * w
                                store(Gr, j, w)
                                store(Gi, j, w_i)
                                store(tile_A, j, load(tile_A, j) + step * X)
                                store(tile_A, matrix + j, load(tile_A, matrix + j) + step * X_i)
                                along_A = along_A + load(Ar, j) * X + load(Ai, j) * X_i * (2 * pi * LOG2_E)
                                along_B = along_B + b * G + b_i * G_i
                                to_B, to_B_i = drive * G, drive * G_i
                                to_C, to_C_i = g2 * load(after, j), -(g2 * load(after, matrix + j))
                                if constant_B:
                                    store(tile_B, matrix + j, load(tile_B, matrix + j) + to_B_i)
                                else:
                                    store(row_B, row_sums + lane, load(row_B, row_sums + lane) + to_B_i)
                                if constant_C:
                                    store(tile_C, matrix + j, load(tile_C, matrix + j) + to_C_i)
                                else:
                                    store(row_C, row_sums + lane, load(row_C, row_sums + lane) + to_C_i)
                            else:
                                G = load(Gr, j) + g * c
                                kept = G * power
                                w = load(rests_now, j) * kept + kept
                                X = w * load(before, j)
                                store(Gr, j, w)
                                store(tile_A, j, load(tile_A, j) + step * X)
                                along_A = along_A + load(Ar, j) * X
                                along_B = along_B + b * G
                                to_B, to_C = drive * G, g * load(after, j)
                            if constant_B:
                                store(tile_B, j, load(tile_B, j) + to_B)
                            else:
                                store(row_B, lane, load(row_B, lane) + to_B)
                            if constant_C:
                                store(tile_C, j, load(tile_C, j) + to_C)
                            else:
                                store(row_C, lane, load(row_C, lane) + to_C)
                        store_part(grad_u, row + at, g * load(skip, at) + step * along_B, count, lanes, edge)
                        to_delta = along_A * LN_2 + x * along_B
                        if delta_softplus:
                            to_delta = to_delta * load(slopes, i * rows + at)
                        store_part(grad_delta, row + at, to_delta, count, lanes, edge)
                        store(tile_bias, at, load(tile_bias, at) + to_delta)
                    if anew:  # no step before sees what comes after
                        clear(Gr, 2 * matrix)
                    row_of_sum = ((block_of_group * batch + item) * n + time) * groups + group
                    for s in range(d_state):
                        for p in range(parts):
                            o = (row_of_sum * d_state + s) * parts + p
                            lane = p * row_sums + s * lanes
                            if not constant_B:
                                grad_B[o] = total(load(row_B, lane))
                            if not constant_C:
                                grad_C[o] = total(load(row_C, lane))

                # float32 sums of a tile are exact enough; across tiles they are added up in float64
                for i in range(planes):
                    sum_A[i] += tile_A[i]
                    sum_B[i] += tile_B[i]
                    sum_C[i] += tile_C[i]
                for i in range(rows):
                    sum_D[i] += tile_D[i]
                    sum_bias[i] += tile_bias[i]
                clear(tile_A, 3 * planes)
                clear(tile_D, 2 * rows)

            for p in range(parts):
                row_of_p = row_of_state + p
                store_transposed(grad_initial_state, row_of_p, parts, width, d_state, lanes, shifted(Gr, p * matrix))
                store_transposed(grad_A, row_of_p, parts, width, d_state, lanes, shifted(sum_A, p * matrix))
                if constant_B:
                    store_transposed(grad_B64, row_of_p, parts, width, d_state, lanes, shifted(sum_B, p * matrix))
                if constant_C:
                    store_transposed(grad_C64, row_of_p, parts, width, d_state, lanes, shifted(sum_C, p * matrix))
            for i in range(width):
                grad_D[item * d + c0 + i] = sum_D[i]
                grad_bias[item * d + c0 + i] = sum_bias[i]
        buffer[0] = 0  # see `aligned`
        sums[0] = 0
        return DONE

    return backward
