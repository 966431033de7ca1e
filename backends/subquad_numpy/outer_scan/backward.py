"""The gradient of the scan of outer products: states are computed again from checkpoints, block by block.

Let e[t] = scale · ∂o[t], u[t] = w[t] v[t], a = exp g, and G[t] the gradient by S[t]. Then

    G[t] = q[t] e[t]ᵀ + diag(a[t+1]) G[t+1],      ∂u[t] = G[t]ᵀ k[t],      ∂k[t] = G[t] u[t],      ∂q[t] = S[t] e[t]
    ∂g[t] = a[t] ∘ Σ_columns G[t] ∘ S[t−1],       ∂v = w ∂u + skip ∘ ∂o,   ∂w = v · ∂u

With a bonus b the output reads S[t−1], which then has the gradient q[t] e[t]ᵀ, and the current token adds, with
γ[t] = u[t] · e[t], (Σ q b k) e to ∂u, γ b ∘ k to ∂q, γ q ∘ b to ∂k, and γ q ∘ k to ∂b.

A task is some heads of a group of one item. It takes one panel of columns after the other: a sweep forward keeps the
panel's state before each block, then the blocks go back, and within a block one tile of rows after the other computes
its states again and walks from the end of the block to its beginning. ∂q and ∂k are added up over panels and heads.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import copy, cut, inline, load, pointer, room, shifted, store, total, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row
from subquad_numpy.codegen.stored import load_stored_part, number_at, store_stored_part
from subquad_numpy.outer_scan.layout import (
    BLOCK,
    HEAD,
    Kinds,
    along,
    cut_at_resets,
    decays_of_channels,
    decays_of_head,
    kinds_of,
)
from subquad_numpy.outer_scan.tile import NEAR, PANEL_VECTORS, TILE_ROWS, advance_tile
from subquad_numpy.outer_scan.tile_gradient import ROWS, VECTORS, gradient_tile, states_tile
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.runtime.stored import STORED_BITS

OUTPUT_BITS = STORED_BITS * len(Kinds._fields)  # of `stored`: how the gradients are stored comes behind them
PANEL = 4  # vectors of columns of a panel: the sums over columns of a row are formed once for each panel

# Arrays of the argument record. What the kernel reads has the shapes of o and state. What it writes, zeros at first:
#     grad_q, grad_k            (parts, batch, total_of_maps, groups, d), one part for each task of a group
#     grad_v, grad_g            (batch, total, heads, d_v), (batch, total, heads, 1 or d)
#     grad_weight               (batch, total, heads)
#     grad_bonus, grad_skip     (batch, heads, d), (batch, heads, d_v): sums over time, in float64
#     grad_initial_state        (batch, heads, d, d_v)
# An address of 0 means that the gradient is not wanted; but q, k, v and the state always have one. `total` and
# `total_of_maps` are the numbers of steps of the arrays written, of which the run has n.
OF_OUTPUTS = ("numbers", "grad_o", "grad_state")
WRITTEN = ("grad_q", "grad_k", "grad_v", "grad_g", "grad_weight", "grad_bonus", "grad_skip", "grad_initial_state")
BACKWARD_RECORD = fields(
    dict.fromkeys(("parts", "total", "total_of_maps", "grad_o_item", "grad_o_step", "grad_o_head")), HEAD,
    dict.fromkeys((*OF_OUTPUTS, *WRITTEN), 0),
)  # fmt: skip


@inline
def _decay_block(
    f: Any, g: Any, stored: int, resets: Any, g_at: int, g_step: int, resets_at: int, resets_step: int, count: int,
    d: int, lanes: int, factors: int, by_channel: bool, edge: Any, factor: Any, keep: Any, mode: Any,
) -> None:  # fmt: skip
    """Write factors and modes of a block."""
    if f.g == 0:
        for i in range(count):
            mode[i] = NEAR
            factor[i] = 0
    elif by_channel:
        decays_of_channels(g, stored, g_at, g_step, count, d, lanes, factors, edge, factor, keep, mode)
    else:
        decays_of_head(g, stored, g_at, g_step, count, lanes, factor, keep, mode)
    if f.resets != 0:
        cut_at_resets(resets, resets_at, resets_step, count, factors, factor, mode)


@cache
def backward_kernel(dtype: str, by_channel: bool) -> Any:
    """Compile `backward(first, last, records)`: tasks first to last − 1 of batch · groups · parts."""
    lanes, kind, zero = element(dtype)
    zero64, byte = np.float64(0), np.uint8(0)
    panel, tile = PANEL * lanes, PANEL_VECTORS * lanes
    advance, advance_narrow = (
        advance_tile(TILE_ROWS, vectors, by_channel, reads=False) for vectors in (PANEL_VECTORS, 1)
    )
    compute, compute_narrow = (states_tile(vectors, by_channel) for vectors in (VECTORS, 1))
    carry, carry_narrow = (gradient_tile(vectors, by_channel) for vectors in (VECTORS, 1))
    name = f"outer scan gradient {dtype}{' by channel' * by_channel}"

    @compiled(name, BACKWARD_RECORD)
    def backward(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, groups, heads, d, d_v, reverse = f.n, f.groups, f.heads, f.d, f.d_v, f.reverse
        q, k, v, g = pointer(f.q, zero), pointer(f.k, zero), pointer(f.v, zero), pointer(f.g, zero)
        weight, skip, resets = pointer(f.weight, zero), pointer(f.skip, zero), pointer(f.resets, byte)
        initial_state, bonus = pointer(f.initial_state, zero), pointer(f.bonus, zero)
        grad_o, grad_state = pointer(f.grad_o, zero), pointer(f.grad_state, zero)
        grad_q, grad_k, grad_v = pointer(f.grad_q, zero), pointer(f.grad_k, zero), pointer(f.grad_v, zero)
        grad_g, grad_weight = pointer(f.grad_g, zero), pointer(f.grad_weight, zero)
        grad_bonus, grad_skip = pointer(f.grad_bonus, zero64), pointer(f.grad_skip, zero64)
        grad_initial_state = pointer(f.grad_initial_state, zero)
        scale, has_bonus = pointer(f.numbers, zero)[0], 1 if f.bonus != 0 else 0
        kinds, by_kinds = kinds_of(f.stored), kinds_of(f.stored >> OUTPUT_BITS)
        shared, blocks = heads // groups, -(-n // BLOCK)
        d_whole = -(-d // lanes) * lanes
        factors = d_whole if by_channel else 1  # numbers of each step
        q_first, q_step = along(f.q_step, n, reverse)
        k_first, k_step = along(f.k_step, n, reverse)
        v_first, v_step = along(f.v_step, n, reverse)
        g_first, g_step = along(f.g_step, n, reverse)
        weight_first, weight_step = along(f.weight_step, n, reverse)
        resets_first, resets_step = along(f.resets_step, n, reverse)
        o_first, o_step = along(f.grad_o_step, n, reverse)
        time_first, time_step = along(1, n, reverse)  # of what is written

        sums_of_step = d_whole if by_channel else lanes  # numbers of a step in sums_of_g
        sizes = (
            *(lanes, d_whole * panel, d_whole * panel, blocks * d_whole * panel, BLOCK * ROWS * VECTORS * lanes),
            *(BLOCK * panel, BLOCK * panel, BLOCK * panel, BLOCK * factors + lanes, BLOCK * factors + lanes),
            *(BLOCK * d_whole, BLOCK * d_whole, BLOCK * d_whole, BLOCK * d_whole, BLOCK * sums_of_step),
            *(d_whole, d_whole, panel, panel, BLOCK, BLOCK),
        )
        buffer = np.empty(room(sizes), kind)
        modes = np.empty(room((BLOCK,)), np.int64)
        (
            edge, S, G, checkpoints, states, u, e, grad_u, factor, keep,
            queries, keys, sums_of_q, sums_of_k, sums_of_g, extra, of_bonus, factor_of_v, sum_of_v, own, gamma,
        ) = cut(buffer, sizes)  # fmt: skip
        (mode,) = cut(modes, (BLOCK,))
        for task in range(first, last):
            part, group, item = task % f.parts, task // f.parts % groups, task // f.parts // groups
            rows_of_part = ((part * f.batch + item) * f.total_of_maps * groups + group) * d
            for head in range(
                group * shared + part * shared // f.parts, group * shared + (part + 1) * shared // f.parts
            ):
                q_row = item * f.q_item + group * f.q_head + q_first
                k_row = item * f.k_item + group * f.k_head + k_first
                g_row = item * f.g_item + head * f.g_head + g_first
                weight_row = item * f.weight_item + head * f.weight_head + weight_first
                resets_row = item * f.resets_item + resets_first
                head_of_item = item * heads + head
                row_of_head = item * f.total * heads + head  # of what is written for each step and head
                if has_bonus != 0:
                    load_padded_row(bonus, item * f.bonus_item + head * d, d, lanes, extra)
                for c0 in range(0, d_v, panel):
                    columns = min(panel, d_v - c0)
                    width = -(-columns // lanes) * lanes
                    matrix = d_whole * width
                    v_row = item * f.v_item + head * f.v_head + v_first + c0
                    o_row = item * f.grad_o_item + head * f.grad_o_head + o_first + c0
                    state_row = head_of_item * d * d_v + c0
                    clear(S, matrix)
                    clear(G, matrix)
                    clear(sum_of_v, panel)
                    clear(of_bonus, d_whole)
                    for r in range(d):
                        if f.initial_state != 0:
                            load_padded_row(initial_state, state_row + r * d_v, columns, lanes, shifted(S, r * width))
                        if f.grad_state != 0:
                            load_padded_row(grad_state, state_row + r * d_v, columns, lanes, shifted(G, r * width))
                    if f.skip != 0:
                        for c in range(width):
                            factor_of_v[c] = skip[head * f.skip_head + (c0 + c) * f.skip_column] if c < columns else 0

                    # The first blocks − 1 sweeps go forward and keep the states before each block; the others go back.
                    for sweep in range(2 * blocks - 1):
                        b = min(sweep, 2 * blocks - 2 - sweep)
                        is_forward = sweep < blocks - 1
                        start = b * BLOCK
                        count = min(BLOCK, n - start)
                        q_at, k_at = q_row + start * q_step, k_row + start * k_step
                        _decay_block(
                            f, g, kinds.g, resets, g_row + start * g_step, g_step, resets_row + start * resets_step,
                            resets_step, count, d, lanes, factors, by_channel, edge, factor, keep, mode,
                        )  # fmt: skip
                        for i in range(count):
                            for c in range(0, d, lanes):
                                query = load_stored_part(q, kinds.q, q_at + i * q_step + c, d - c, lanes, edge)
                                store(queries, i * d_whole + c, query)
                                key = load_stored_part(k, kinds.k, k_at + i * k_step + c, d - c, lanes, edge)
                                store(keys, i * d_whole + c, key)
                            at = v_row + (start + i) * v_step
                            w = zero + 1
                            if f.weight != 0:
                                w = number_at(weight, kinds.weight, weight_row + (start + i) * weight_step)
                            for c in range(0, width, lanes):
                                x = load_stored_part(v, kinds.v, at + c, columns - c, lanes, edge)
                                store(u, i * width + c, x * w)
                        if sweep < blocks:
                            copy(S, matrix, shifted(checkpoints, b * matrix))
                        if is_forward:
                            for r in range(0, d_whole, TILE_ROWS):
                                f_r, keep_r = factor, keep
                                if by_channel:
                                    f_r, keep_r = shifted(factor, r), shifted(keep, r)
                                k_r = shifted(keys, r)
                                for c in range(0, width, tile):
                                    S_r, u_c = shifted(S, r * width + c), shifted(u, c)
                                    if width - c >= tile:
                                        advance(
                                            k_r, d_whole, k_r, d_whole, f_r, keep_r, factors, mode, u_c, u_c, width,
                                            count, S_r,
                                        )  # fmt: skip
                                    else:
                                        advance_narrow(
                                            k_r, d_whole, k_r, d_whole, f_r, keep_r, factors, mode, u_c, u_c, width,
                                            count, S_r,
                                        )  # fmt: skip
                            continue

                        for i in range(count):
                            at = o_row + (start + i) * o_step
                            along_columns = zeros(edge)
                            for c in range(0, width, lanes):
                                x = load_stored_part(grad_o, kinds.o, at + c, columns - c, lanes, edge) * scale
                                store(e, i * width + c, x)
                                along_columns = along_columns + x * load(u, i * width + c)
                            own[i] = 0
                            gamma[i] = 0
                            if has_bonus != 0:
                                gamma[i] = total(along_columns)
                                along_rows = zeros(edge)
                                for c in range(0, d, lanes):
                                    query, key = load(queries, i * d_whole + c), load(keys, i * d_whole + c)
                                    along_rows = along_rows + query * load(extra, c) * key
                                own[i] = total(along_rows)
                        clear(grad_u, count * width)
                        clear(sums_of_q, count * d_whole)
                        clear(sums_of_k, count * d_whole)
                        clear(sums_of_g, count * sums_of_step)
                        for r0 in range(0, d, ROWS):
                            f_r, keep_r = factor, keep
                            if by_channel:
                                f_r, keep_r = shifted(factor, r0), shifted(keep, r0)
                            k_r, q_r = shifted(keys, r0), shifted(queries, r0)
                            to_q, to_k, to_g = shifted(sums_of_q, r0), shifted(sums_of_k, r0), sums_of_g
                            if by_channel:
                                to_g = shifted(sums_of_g, r0)
                            is_wide = width % (VECTORS * lanes) == 0
                            for c in range(0, width, VECTORS * lanes if is_wide else lanes):
                                cell = r0 * width + c
                                S_r, G_r = shifted(checkpoints, b * matrix + cell), shifted(G, cell)
                                u_c, e_c, by_u = shifted(u, c), shifted(e, c), shifted(grad_u, c)
                                if is_wide:
                                    compute(
                                        k_r, d_whole, f_r, keep_r, factors, mode, u_c, e_c, has_bonus, width, count,
                                        S_r, states, to_q,
                                    )  # fmt: skip
                                    carry(
                                        k_r, q_r, d_whole, f_r, keep_r, factors, mode, u_c, e_c, by_u, has_bonus, width,
                                        count, G_r, states, to_k, to_g,
                                    )  # fmt: skip
                                else:
                                    compute_narrow(
                                        k_r, d_whole, f_r, keep_r, factors, mode, u_c, e_c, has_bonus, width, count,
                                        S_r, states, to_q,
                                    )  # fmt: skip
                                    carry_narrow(
                                        k_r, q_r, d_whole, f_r, keep_r, factors, mode, u_c, e_c, by_u, has_bonus, width,
                                        count, G_r, states, to_k, to_g,
                                    )  # fmt: skip
                        for i in range(count):
                            time = time_first + (start + i) * time_step
                            for c in range(0, d, lanes):
                                at, place = i * d_whole + c, rows_of_part + time * groups * d + c
                                by_q, by_k = load(sums_of_q, at), load(sums_of_k, at)
                                if has_bonus != 0:
                                    query, key, own_weight = load(queries, at), load(keys, at), load(extra, c)
                                    by_q = by_q + own_weight * key * gamma[i]
                                    by_k = by_k + own_weight * query * gamma[i]
                                    store(of_bonus, c, load(of_bonus, c) + query * key * gamma[i])
                                by_q = by_q + load_stored_part(grad_q, by_kinds.q, place, d - c, lanes, edge)
                                by_k = by_k + load_stored_part(grad_k, by_kinds.k, place, d - c, lanes, edge)
                                store_stored_part(grad_q, by_kinds.q, place, by_q, d - c, lanes, edge)
                                store_stored_part(grad_k, by_kinds.k, place, by_k, d - c, lanes, edge)
                                if by_channel and f.grad_g != 0:
                                    place = (row_of_head + time * heads) * d + c
                                    decay = load(factor, i * factors + c) + load(keep, i * factors + c)
                                    by_g = load_stored_part(grad_g, by_kinds.g, place, d - c, lanes, edge)
                                    by_g = by_g + decay * load(sums_of_g, at)
                                    store_stored_part(grad_g, by_kinds.g, place, by_g, d - c, lanes, edge)
                        if f.grad_bonus != 0:
                            for r in range(d):
                                grad_bonus[head_of_item * d + r] += of_bonus[r]
                            clear(of_bonus, d_whole)

                        for i in range(count):
                            step_of_head = row_of_head + (time_first + (start + i) * time_step) * heads
                            at, place = v_row + (start + i) * v_step, step_of_head * d_v + c0
                            w = zero + 1
                            if f.weight != 0:
                                w = number_at(weight, kinds.weight, weight_row + (start + i) * weight_step)
                            along_columns = zeros(edge)
                            for c in range(0, width, lanes):
                                by_u = load(grad_u, i * width + c)
                                if has_bonus != 0:
                                    by_u = by_u + load(e, i * width + c) * own[i]
                                x = load_stored_part(v, kinds.v, at + c, columns - c, lanes, edge)
                                along_columns = along_columns + by_u * x
                                by_v = by_u * w
                                if f.skip != 0:
                                    out_at = o_row + (start + i) * o_step + c
                                    out = load_stored_part(grad_o, kinds.o, out_at, columns - c, lanes, edge)
                                    by_v = by_v + out * load(factor_of_v, c)
                                    store(sum_of_v, c, load(sum_of_v, c) + out * x)
                                store_stored_part(grad_v, by_kinds.v, place + c, by_v, columns - c, lanes, edge)
                            if f.grad_weight != 0:
                                grad_weight[step_of_head] += total(along_columns)
                            if not by_channel and f.grad_g != 0:
                                decay = factor[i]
                                if mode[i] == NEAR:
                                    decay = decay + 1
                                grad_g[step_of_head] += decay * total(load(sums_of_g, i * lanes))
                        if f.grad_skip != 0:
                            for c in range(columns):
                                grad_skip[head_of_item * d_v + c0 + c] += sum_of_v[c]
                        clear(sum_of_v, panel)

                    for r in range(d):
                        for c in range(columns):
                            grad_initial_state[state_row + r * d_v + c] = G[r * width + c]
        modes[0] = 0
        return DONE

    return backward
