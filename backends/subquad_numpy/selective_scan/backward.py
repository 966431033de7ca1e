"""The gradient of the scan for real states: tiles of time from the last to the first, pairs of vectors of channels.

See `gradient` for what is computed, and `retreat` for a tile.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import add_up, aligned, copy, load, pointer, prefetch_far, shifted
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row
from subquad_numpy.codegen.vector_math import LOG2_E
from subquad_numpy.selective_scan.advance import advance
from subquad_numpy.selective_scan.four import AT_ONCE, ENOUGH
from subquad_numpy.selective_scan.gradient import (
    APART,
    BACKWARD_RECORD,
    row_of_sums,
    write_quarters,
    write_task,
    written_by,
)
from subquad_numpy.selective_scan.layout import (
    find_step,
    inputs_of,
    load_matrix,
    load_rates,
    locate,
    options_of,
    place_of_states,
    resets_of,
    sizes_of,
)
from subquad_numpy.selective_scan.notes import NOTES, note_tile, write_tile
from subquad_numpy.selective_scan.recurrence import find_gaps
from subquad_numpy.selective_scan.retreat import LEFT, through_tile
from subquad_numpy.selective_scan.rotate_back import complex_kernel


@cache
def backward_kernel(dtype: str, is_complex: bool, constant_B: bool, constant_C: bool) -> Any:
    """Compile `backward(first, last, records)`: tasks first to last - 1 of batch * groups * blocks."""
    if is_complex:
        return complex_kernel(dtype, constant_B, constant_C)
    lanes, kind, zero = element(dtype)
    name = f"selective scan gradient {dtype}{' constant B' * constant_B}{' constant C' * constant_C}"

    @compiled(name, BACKWARD_RECORD)
    def backward(first: int, last: int, records: Any) -> int:
        f = records[0]
        _, n, d, groups, d_state, block, _, tile, B_step, C_step, delta_softplus, reverse = sizes_of(f)
        u, delta, A, B, C, D, z, delta_bias, initial_state = inputs_of(f, zero)
        has_D, has_z, has_bias, has_state = options_of(f)
        resets, has_resets = resets_of(f)
        grad_y, grad_state = pointer(f.grad_y, zero), pointer(f.grad_state, zero)
        grad_u, grad_delta, grad_z, grad_B, grad_C = written_by(f, zero)
        saved, has_saved, part = pointer(f.checkpoints, zero), f.checkpoints != 0, f.part

        tiles = -(-n // tile)
        swept = 0 if has_saved else tiles - 1  # tiles whose states a first sweep finds

        # Sizes in scratch: a row of the block, in whole pairs of vectors; a matrix; the sums over channels of a step
        rows = -(-block // (2 * lanes)) * 2 * lanes
        matrix = rows * d_state + APART * lanes
        quarters = (-(-d_state // AT_ONCE) + 1) * lanes
        of_sums = 2 * (tile + 2) * quarters
        buffer = np.empty(
            (7 + swept) * matrix + of_sums + 5 * rows + 2 * tile * (NOTES + LEFT + 4) * lanes + 2 * lanes, kind
        )
        edge = aligned(buffer)
        Ar = shifted(edge, lanes)
        Br = shifted(Ar, matrix)
        Cr = shifted(Br, matrix)
        Gr = shifted(Cr, matrix)  # exp(x[t+1]) G[t+1]
        tile_B = shifted(Gr, matrix)  # sums over the tile
        tile_C = shifted(tile_B, matrix)
        checkpoints = shifted(tile_C, matrix)  # the state before each tile, or before the first one
        row_B = shifted(checkpoints, (swept + 1) * matrix)  # sums over channels of each step of the tile
        row_C = shifted(row_B, of_sums // 2)
        skip = shifted(row_C, of_sums // 2)
        bias = shifted(skip, rows)
        bases = shifted(bias, rows)
        gaps = shifted(bases, rows)
        even = shifted(gaps, rows)
        notes = shifted(even, rows)
        left = shifted(notes, 2 * tile * NOTES * lanes)
        pairs_here = shifted(left, 2 * tile * LEFT * lanes)  # rows of inputs, where these end within a vector
        sums = np.empty(3 * matrix + 2 * rows + 8, np.float64)  # sums over all tiles
        sum_A = aligned(sums)
        sum_B = shifted(sum_A, matrix)
        sum_C = shifted(sum_B, matrix)
        sum_D = shifted(sum_C, matrix)
        sum_bias = shifted(sum_D, rows)

        for task in range(first, last):
            item, group, block_of_group, c0, width = locate(task, d, groups, block)
            first_part = block_of_group * block
            row_of_A = c0 * d_state
            row_of_state = (item * d + c0) * d_state

            clear(checkpoints, matrix)
            clear(skip, 5 * rows)
            clear(tile_B, 2 * matrix)
            clear(sum_A, 3 * matrix + 2 * rows)
            load_rates(A, row_of_A, width, d_state, lanes, LOG2_E, False, Ar, Ar, Ar)
            find_gaps(Ar, -(-width // lanes), d_state, lanes, bases, gaps, even)
            load_matrix(grad_state, row_of_state, width, d_state, lanes, False, Gr, Gr)
            if constant_B:
                load_matrix(B, row_of_A, width, d_state, lanes, False, Br, Br)
            if constant_C:
                load_matrix(C, row_of_A, width, d_state, lanes, False, Cr, Cr)
            if has_state:
                load_matrix(initial_state, row_of_state, width, d_state, lanes, False, checkpoints, checkpoints)
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
                goes_back, sign = sweep >= swept, -1 if reverse else 1
                _, first_row, first_B, first_C = find_step(
                    start, item, n, d, c0, groups, group, d_state, B_step, C_step, reverse
                )
                first_reset = shifted(resets, item * n + (n - 1 - start if reverse else start))
                of_row, of_maps = sign * d, sign * groups * d_state
                of_B, of_C = 0 if constant_B else quarters, 0 if constant_C else quarters
                next_tile = -tile * of_row if goes_back else tile * of_row
                place, _ = place_of_states(f, item, k, group, c0, lanes, 1)
                next_place, _ = place_of_states(f, item, k - 1, group, c0, lanes, 1)
                before = shifted(saved, place) if has_saved else shifted(checkpoints, k * matrix)
                after = shifted(checkpoints, (k + 1) * matrix)
                if not goes_back:
                    copy(before, matrix, after)
                for pair in range(0, width, 2 * lanes):
                    if goes_back and pair % part == 0 and not (constant_B and constant_C):
                        clear(row_B, of_sums)
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
                                prefetch_far(saved, next_place + j + s)
                        write_tile(
                            now, length, lanes, first_row + at, of_row, width - at, edge, load(skip, at), has_z,
                            delta_softplus != 0, grad_u, grad_delta, grad_z, shifted(sum_bias, at), shifted(sum_D, at),
                        )  # fmt: skip
                    if pair + 2 * lanes < width and (pair + 2 * lanes) % part != 0:
                        continue
                    for i in range(length):
                        time = n - 1 - start - i if reverse else start + i
                        row = row_of_sums(f, item, time, group, (first_part + pair) // part)
                        if not constant_B:
                            write_quarters(shifted(row_B, i * quarters), d_state, lanes, grad_B, row)
                        if not constant_C:
                            write_quarters(shifted(row_C, i * quarters), d_state, lanes, grad_C, row)
                if goes_back and (constant_B or constant_C):
                    for i in range(0, matrix, lanes):
                        add_up(sum_B, i, load(tile_B, i))
                        add_up(sum_C, i, load(tile_C, i))
                    clear(tile_B, 2 * matrix)

            write_task(
                f, zero, item, c0, width, lanes, 1, matrix, Gr, sum_A, sum_B, sum_C, sum_D, sum_bias, constant_B,
                constant_C,
            )  # fmt: skip
        sums[0] = 0
        return DONE

    return backward
