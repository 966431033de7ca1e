"""The gradient of the scan for complex states: through all channels of a block at each step of a tile, and back.

See `gradient` for what is computed.
"""

from math import pi
from typing import Any

import numpy as np

from subquad_numpy.codegen import add_up, aligned, copy, load, pointer, shifted, spread, store, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row, load_part, store_part
from subquad_numpy.codegen.side_by_side import scaled_exp2
from subquad_numpy.codegen.vector_math import LOG2_E, scaled_rotation
from subquad_numpy.selective_scan.forward import ROWS_AHEAD
from subquad_numpy.selective_scan.gradient import (
    APART,
    BACKWARD_RECORD,
    row_of_sums,
    write_sums,
    write_task,
    written_by,
)
from subquad_numpy.selective_scan.layout import (
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
from subquad_numpy.selective_scan.notes import LN_2
from subquad_numpy.selective_scan.rotate import read_step


def complex_kernel(dtype: str, constant_B: bool, constant_C: bool) -> Any:
    """`backward_kernel` of complex states."""
    lanes, kind, zero = element(dtype)
    parts = 2
    name = f"selective scan gradient complex {dtype}{' constant B' * constant_B}{' constant C' * constant_C}"

    @compiled(name, BACKWARD_RECORD)
    def backward(first: int, last: int, records: Any) -> int:
        f = records[0]
        _, n, d, groups, d_state, block, _, tile, B_step, C_step, delta_softplus, reverse = sizes_of(f)
        u, delta, A, B, C, D, z, delta_bias, initial_state = inputs_of(f, zero)
        has_D, has_z, has_bias, has_state = options_of(f)
        resets, has_resets = resets_of(f)
        grad_y, grad_state = pointer(f.grad_y, zero), pointer(f.grad_state, zero)
        grad_u, grad_delta, grad_z, grad_B, grad_C = written_by(f, zero)
        saved, has_saved = pointer(f.checkpoints, zero), f.checkpoints != 0

        tiles = -(-n // tile)
        swept = 0 if has_saved else tiles - 1  # tiles whose states a first sweep finds
        ahead = -ROWS_AHEAD * d if reverse else ROWS_AHEAD * d

        # Sizes in scratch: a row of the block, in whole pairs of vectors; a real matrix, a complex one; one vector for
        # each state.
        rows = -(-block // (2 * lanes)) * 2 * lanes
        matrix = rows * d_state + APART * lanes
        planes = parts * matrix
        row_sums = d_state * lanes
        buffer = np.empty(
            (9 + tile) * matrix + (6 + 2 * tile + swept) * planes + 4 * row_sums + (9 + 4 * tile) * rows + 2 * lanes,
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
        gates = shifted(tile_bias, rows)  # silu(z), and its slope
        gate_slopes = shifted(gates, rows)
        steps = shifted(gate_slopes, rows)  # of each step of the tile: Δ, u, g, and the slope of the softplus
        inputs = shifted(steps, tile * rows)
        gs = shifted(inputs, tile * rows)
        slopes = shifted(gs, tile * rows)
        pairs_here = shifted(slopes, tile * rows)  # rows of inputs, where these end within a vector
        sums = np.empty(6 * matrix + 2 * rows + 8, np.float64)  # sums over all tiles
        sum_A = aligned(sums)
        sum_B = shifted(sum_A, planes)
        sum_C = shifted(sum_B, planes)
        sum_D = shifted(sum_C, planes)
        sum_bias = shifted(sum_D, rows)
        clear(nothing, planes)

        for task in range(first, last):
            item, group, block_of_group, c0, width = locate(task, d, groups, block)
            vectors = -(-width // lanes)
            row_of_A = c0 * d_state * parts
            row_of_state = (item * d + c0) * d_state * parts

            clear(checkpoints, planes)
            clear(skip, 4 * rows)
            clear(tile_A, 3 * planes)
            clear(sum_A, 6 * matrix + 2 * rows)
            load_rates(A, row_of_A, width, d_state, lanes, LOG2_E, True, Ar, Ai, Ai_rest)
            load_matrix(grad_state, row_of_state, width, d_state, lanes, True, Gr, Gi)
            if constant_B:
                load_matrix(B, row_of_A, width, d_state, lanes, True, Br, Bi)
            if constant_C:
                load_matrix(C, row_of_A, width, d_state, lanes, True, Cr, Ci)
            if has_state:
                imaginary = shifted(checkpoints, matrix)
                load_matrix(initial_state, row_of_state, width, d_state, lanes, True, checkpoints, imaginary)
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

            write_task(
                f, zero, item, c0, width, lanes, parts, matrix, Gr, sum_A, sum_B, sum_C, sum_D, sum_bias, constant_B,
                constant_C,
            )  # fmt: skip
        sums[0] = 0
        return DONE

    return backward
