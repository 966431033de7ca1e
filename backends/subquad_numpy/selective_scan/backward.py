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

from subquad_numpy.codegen import (
    add_up,
    aligned,
    copy,
    inline,
    load,
    pointer,
    prefetch,
    shifted,
    spread,
    store,
    total,
    zeros,
)
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row, load_part, store_part, store_transposed
from subquad_numpy.codegen.side_by_side import scaled_exp2
from subquad_numpy.codegen.turn import totals
from subquad_numpy.codegen.vector_math import LOG2_E, scaled_rotation
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.selective_scan.advance import advance
from subquad_numpy.selective_scan.forward import ROWS_AHEAD
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
from subquad_numpy.selective_scan.retreat import LEFT, LN_2, NOTES, note_tile, through_tile, write_step
from subquad_numpy.selective_scan.rotate import read_step

# Arrays of the argument record. What the kernel reads has the shapes of y, state; what it writes has these shapes:
#     OF_ROWS      the shapes of u, delta, z, initial_state
#     OVER_TIME    (batch, d, d_state), (batch, d), (batch, d): sums over time of each batch item, in float64
#     OF_MAPS      (blocks of a group, batch, n, groups, d_state) from each block of channels; a constant map as A
OF_OUTPUTS, OF_ROWS = ("grad_y", "grad_state"), ("grad_u", "grad_delta", "grad_z", "grad_initial_state")
OVER_TIME = ("grad_A", "grad_D", "grad_delta_bias")
OF_MAPS = ("grad_B", "grad_C")
BACKWARD_RECORD = fields(HEAD, dict.fromkeys((*OF_OUTPUTS, *OF_ROWS, *OVER_TIME, *OF_MAPS, "checkpoints"), 0))
"""The argument record of a gradient kernel; `checkpoints` are those of the forward pass, or address 0."""


APART = 5  # lines between matrices: a load waits for a store 4096 bytes away, which a machine takes for the same place


@inline
def row_of_sums(f: Any, item: int, time: int, group: int, block_of_group: int) -> int:
    """The row of grad_B and grad_C of a step and a block."""
    return ((block_of_group * f.batch + item) * f.n + time) * f.groups + group


@inline
def write_sums(sums: Any, row_sums: int, parts: int, d_state: int, lanes: int, target: Any, row: int) -> None:
    """Write the sums over channels of one step: one vector for each state, of real parts, then of imaginary parts."""
    whole = d_state // lanes * lanes if parts == 1 else 0
    for s in range(0, whole, lanes):
        store(target, row * d_state + s, totals(sums, s * lanes))
    for s in range(whole, d_state):
        for p in range(parts):
            target[(row * d_state + s) * parts + p] = total(load(sums, p * row_sums + s * lanes))


@cache
def backward_kernel(dtype: str, is_complex: bool, constant_B: bool, constant_C: bool) -> Any:
    """Compile `backward(first, last, records)`: tasks first to last - 1 of batch * groups * blocks."""
    lanes, kind, zero = element(dtype)
    zero64 = np.float64(0)
    parts = 2 if is_complex else 1
    name = f"backward {'complex ' * is_complex}{dtype}{' constant B' * constant_B}{' constant C' * constant_C}"

    @compiled(name, BACKWARD_RECORD)
    def backward(first: int, last: int, records: Any) -> int:
        f = records[0]
        _, n, d, groups, d_state, block, _, tile, B_step, C_step, delta_softplus, reverse = sizes_of(f)
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
        matrix = rows * d_state + APART * lanes
        planes = parts * matrix
        row_sums = d_state * lanes
        of_steps = tile if is_complex else 0  # steps whose states and decays are kept for all channels of the block
        buffer = np.empty(
            (9 + of_steps) * matrix
            + (6 + 2 * of_steps + swept) * planes
            + (2 * tile + 4) * row_sums
            + (10 + 4 * of_steps) * rows
            + 2 * tile * (NOTES + LEFT + 4) * lanes
            + (3 * rows if is_complex else 0)
            + 6 * lanes,
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
        powers = shifted(states, (of_steps + 1) * planes)  # the decays of each step of the tile: see `scaled_exp2`
        rests = shifted(powers, of_steps * matrix)
        nothing = shifted(rests, of_steps * planes)  # the state before a step with a reset
        row_B = shifted(nothing, planes)  # sums over the channels of one step, or of each step of the tile
        row_C = shifted(row_B, (tile + 2) * row_sums)
        skip = shifted(row_C, (tile + 2) * row_sums)
        bias = shifted(skip, rows)
        tile_D = shifted(bias, rows)
        tile_bias = shifted(tile_D, rows)
        bases = shifted(tile_bias, rows)
        gaps = shifted(bases, rows)
        even = shifted(gaps, rows)
        gates = shifted(even, rows)  # silu(z), and its slope
        gate_slopes = shifted(gates, rows)
        steps = shifted(gate_slopes, rows)  # of each step of the tile: Δ, u, g, and the slope of the softplus
        inputs = shifted(steps, of_steps * rows)
        gs = shifted(inputs, of_steps * rows)
        slopes = shifted(gs, of_steps * rows)
        notes = shifted(slopes, of_steps * rows)  # of real states: see `retreat`
        left = shifted(notes, 2 * tile * NOTES * lanes)
        pairs_here = shifted(left, 2 * tile * LEFT * lanes)  # rows of inputs, where these end within a vector
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
                if not is_complex:
                    goes_back, sign = sweep >= swept, -1 if reverse else 1
                    _, first_row, first_B, first_C = find_step(
                        start, item, n, d, c0, groups, group, d_state, B_step, C_step, reverse
                    )
                    first_reset = shifted(resets, item * n + (n - 1 - start if reverse else start))
                    of_row, of_maps = sign * d, sign * groups * d_state
                    of_B, of_C = 0 if constant_B else row_sums, 0 if constant_C else row_sums
                    next_tile = -tile * of_row if goes_back else tile * of_row
                    place, _ = place_of_states(f, item, k, group, c0, lanes, parts)
                    next_place, _ = place_of_states(f, item, k - 1, group, c0, lanes, parts)
                    before = shifted(saved, place) if has_saved else shifted(checkpoints, k * planes)
                    after = shifted(checkpoints, (k + 1) * planes)
                    if not goes_back:
                        copy(before, planes, after)
                    elif not constant_B or not constant_C:
                        clear(row_B, 2 * (tile + 2) * row_sums)
                    for pair in range(0, width, 2 * lanes):
                        left_here, place = min(width - pair, 2 * lanes), first_row + pair + next_tile
                        asked = (
                            (shifted(delta, place), of_row),
                            (shifted(grad_y, place), of_row),
                            (shifted(u, place), of_row),
                            (shifted(z, place), of_row),
                            (shifted(grad_u, place), of_row),
                            (shifted(grad_delta, place), of_row),
                            (shifted(grad_z, place), of_row),
                        )
                        note_tile(
                            notes, length, delta, u, z, grad_y, first_row + pair, of_row, left_here, lanes, pairs_here,
                            shifted(bias, pair), shifted(skip, pair), shifted(bases, pair), shifted(gaps, pair),
                            even[pair] != 0 or even[pair + lanes] != 0, has_z, delta_softplus != 0,
                            d_state < ENOUGH or not goes_back, asked[:4],
                        )  # fmt: skip
                        j = pair * d_state
                        B_now = shifted(Br, j) if constant_B else shifted(B, first_B)
                        C_now = shifted(Cr, j) if constant_C else shifted(C, first_C)
                        if goes_back:
                            through_tile(
                                notes, left, length, lanes, d_state, (left_here + lanes - 1) // lanes,
                                shifted(even, pair), has_z,
                                shifted(before, j), shifted(Gr, j), shifted(Ar, j), shifted(sum_A, j), B_now, of_maps,
                                constant_B, shifted(tile_B, j) if constant_B else row_B, of_B, C_now, of_maps,
                                constant_C, shifted(tile_C, j) if constant_C else row_C, of_C, first_reset, sign,
                                has_resets, asked,
                            )  # fmt: skip
                        if not goes_back:
                            nowhere = delta, 0
                            advance(
                                notes, NOTES * 2 * lanes, length, lanes, d_state, (left_here + lanes - 1) // lanes,
                                shifted(even, pair), shifted(after, j), shifted(Ar, j), B_now, of_maps, constant_B,
                                B_now, of_maps, constant_B, first_reset, sign, has_resets, False,
                                (nowhere, nowhere, nowhere, nowhere),
                            )  # fmt: skip
                            continue
                        for at in range(pair, min(width, pair + 2 * lanes), lanes):
                            now, j = shifted(notes, at - pair), at * d_state
                            if has_saved:
                                for s in range(0, d_state * lanes, lanes):
                                    prefetch(saved, next_place + j + s)
                            to_bias, to_D = zeros(edge), zeros(edge)
                            for i in range(length):
                                row = first_row + i * of_row + at
                                by_delta, by_D = write_step(
                                    now, i, lanes, row, width - at, edge, load(skip, at), has_z, delta_softplus != 0,
                                    grad_u, grad_delta, grad_z,
                                )  # fmt: skip
                                to_bias, to_D = to_bias + by_delta, to_D + by_D
                            add_up(sum_bias, at, to_bias)
                            add_up(sum_D, at, to_D)
                    if goes_back:
                        for i in range(length):
                            time = n - 1 - start - i if reverse else start + i
                            row = row_of_sums(f, item, time, group, block_of_group)
                            if not constant_B:
                                write_sums(shifted(row_B, i * row_sums), row_sums, 1, d_state, lanes, grad_B, row)
                            if not constant_C:
                                write_sums(shifted(row_C, i * row_sums), row_sums, 1, d_state, lanes, grad_C, row)
                        if constant_B or constant_C:
                            for i in range(0, matrix, lanes):
                                add_up(sum_B, i, load(tile_B, i))
                                add_up(sum_C, i, load(tile_C, i))
                            clear(tile_B, 2 * matrix)
                    continue
                if has_saved:
                    place, plane = place_of_states(f, item, k, group, c0, lanes, parts)
                    for p in range(parts):
                        copy(shifted(saved, place + p * plane), vectors * d_state * lanes, shifted(states, p * matrix))
                else:
                    copy(shifted(checkpoints, k * planes), planes, states)
                for i in range(length):
                    time, row, row_of_B, row_of_C = find_step(
                        start + i, item, n, d, c0, groups, group, d_state * parts, B_step, C_step, reverse
                    )
                    anew = has_resets and resets[item * n + time] != 0
                    before = nothing if anew else shifted(states, i * planes)
                    after = shifted(states, (i + 1) * planes)
                    powers_now, rests_now = shifted(powers, i * matrix), shifted(rests, i * planes)
                    steps_now, inputs_now = shifted(steps, i * rows), shifted(inputs, i * rows)
                    gs_now = shifted(gs, i * rows)
                    read_step(
                        delta, u, z, grad_y, 0, row, ahead, width, lanes, pairs_here, bias, has_z, delta_softplus != 0,
                        True, steps_now, inputs_now, gates, shifted(slopes, i * rows), gate_slopes,
                    )  # fmt: skip
                    clear(row_C, 2 * row_sums)
                    for v in range(vectors):
                        at = v * lanes
                        count = width - at
                        step, x = load(steps_now, at), load(inputs_now, at)
                        by_y = load_part(grad_y, row + at, count, lanes, edge)
                        g = by_y * load(gates, at) if has_z else by_y
                        store(gs_now, at, g)
                        store(tile_D, at, load(tile_D, at) + g * x)
                        by_C = shifted(tile_C, at * d_state) if constant_C else row_C
                        drive = step * x
                        out = x * load(skip, at)
                        out, g2 = out * 0.5, g + g
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
                            add_up(by_C, s * lanes, g2 * next_h)
                            add_up(by_C, (matrix if constant_C else row_sums) + s * lanes, -(g2 * next_h_i))
                        out = out * 2.0
                        if has_z and sweep >= swept:
                            store_part(grad_z, row + at, by_y * out * load(gate_slopes, at), count, lanes, edge)
                    if not constant_C and sweep >= swept:
                        write_sums(
                            row_C,
                            row_sums,
                            parts,
                            d_state,
                            lanes,
                            grad_C,
                            row_of_sums(f, item, time, group, block_of_group),
                        )
                if sweep < swept:
                    copy(shifted(states, length * planes), planes, shifted(checkpoints, (k + 1) * planes))
                    clear(tile_C, planes)
                    clear(tile_D, rows)
                    continue

                for i in range(length - 1, -1, -1):
                    time, row, row_of_B, row_of_C = find_step(
                        start + i, item, n, d, c0, groups, group, d_state * parts, B_step, C_step, reverse
                    )
                    anew = has_resets and resets[item * n + time] != 0
                    before = nothing if anew else shifted(states, i * planes)
                    powers_now, rests_now = shifted(powers, i * matrix), shifted(rests, i * planes)
                    steps_now, inputs_now = shifted(steps, i * rows), shifted(inputs, i * rows)
                    gs_now = shifted(gs, i * rows)
                    clear(row_B, 2 * row_sums)
                    for v in range(vectors):
                        at = v * lanes
                        count = width - at
                        step, x, g = load(steps_now, at), load(inputs_now, at), load(gs_now, at)
                        by_B = shifted(tile_B, at * d_state) if constant_B else row_B
                        along_A, along_B, drive, g2 = zeros(edge), zeros(edge), step * x, g + g
                        for s in range(d_state):
                            j = at * d_state + s * lanes
                            b = load(Br, j) if constant_B else spread(B, row_of_B + 2 * s)
                            c = load(Cr, j) if constant_C else spread(C, row_of_C + 2 * s)
                            b_i = load(Bi, j) if constant_B else spread(B, row_of_B + 2 * s + 1)
                            c_i = load(Ci, j) if constant_C else spread(C, row_of_C + 2 * s + 1)
                            G, G_i = load(Gr, j) + g2 * c, load(Gi, j) - g2 * c_i
                            a, a_i = load(rests_now, j), load(rests_now, matrix + j)
                            h, h_i = load(before, j), load(before, matrix + j)
                            power = load(powers_now, j)
                            kept, kept_i = G * power, G_i * power
                            w = kept + (a * kept + a_i * kept_i)
                            w_i = kept_i + (a * kept_i - a_i * kept)
                            X, X_i = h * w + h_i * w_i, h * w_i - h_i * w
                            store(Gr, j, w)
                            store(Gi, j, w_i)
                            add_up(tile_A, j, step * X)
                            add_up(tile_A, matrix + j, step * X_i)
                            along_A = along_A + load(Ar, j) * X + load(Ai, j) * X_i * (2 * pi * LOG2_E)
                            along_B = along_B + b * G + b_i * G_i
                            add_up(by_B, s * lanes, drive * G)
                            add_up(by_B, (matrix if constant_B else row_sums) + s * lanes, drive * G_i)
                        store_part(grad_u, row + at, g * load(skip, at) + step * along_B, count, lanes, edge)
                        to_delta = along_A * LN_2 + x * along_B
                        if delta_softplus:
                            to_delta = to_delta * load(slopes, i * rows + at)
                        store_part(grad_delta, row + at, to_delta, count, lanes, edge)
                        store(tile_bias, at, load(tile_bias, at) + to_delta)
                    if anew:  # no step before sees what comes after
                        clear(Gr, 2 * matrix)
                    if not constant_B:
                        write_sums(
                            row_B,
                            row_sums,
                            parts,
                            d_state,
                            lanes,
                            grad_B,
                            row_of_sums(f, item, time, group, block_of_group),
                        )

                # float32 sums of a tile are exact enough; across tiles they are added up in float64
                for i in range(0, planes, lanes):
                    add_up(sum_A, i, load(tile_A, i))
                    if constant_B:
                        add_up(sum_B, i, load(tile_B, i))
                    if constant_C:
                        add_up(sum_C, i, load(tile_C, i))
                for i in range(0, rows, lanes):
                    add_up(sum_D, i, load(tile_D, i))
                    add_up(sum_bias, i, load(tile_bias, i))
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
        sums[0] = 0
        return DONE

    return backward
