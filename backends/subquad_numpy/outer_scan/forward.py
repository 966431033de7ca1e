"""The scan of outer products: one pass over time, tiles of the state in registers.

    S[t] = diag(exp g[t]) S[t−1] + w[t] k[t] v[t]ᵀ,      o[t] = scale · S[t]ᵀ q[t] + skip ∘ v[t]

A task is some panels of columns of the state of one head. It goes through time in blocks of `BLOCK` steps: decays of a
block, and rows that are widened, are written to scratch once for all panels. For each panel so are its weighted values;
then each tile of its rows walks through the block, and adds to the outputs there. Every step is computed in the same
way wherever a block begins.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import cut, inline, load, pointer, room, shifted, store, total, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row, load_part, store_part
from subquad_numpy.codegen.stored import load_stored_part, number_at, rows_of, store_stored_part, stored_as
from subquad_numpy.codegen.vector_math import sigmoid
from subquad_numpy.outer_scan.layout import (
    BLOCK,
    HEAD,
    Kinds,
    along,
    cut_at_resets,
    decays_of_channels,
    decays_of_head,
    kinds_of,
    load_state,
)
from subquad_numpy.outer_scan.panel import advance_panel
from subquad_numpy.outer_scan.tile import NEAR, PANEL_VECTORS
from subquad_numpy.runtime.arguments import fields

Z = len(Kinds._fields)  # the place of z in `stored`
FORWARD_RECORD = fields(
    HEAD, dict.fromkeys(("panels", "z_item", "z_step", "z_head")), {"z": 0, "numbers": 0, "o": 0, "state": 0}
)
"""The argument record; `panels` is how many a task has, and `numbers` holds the scale. Without o (address 0) only the
state is found. Without z (address 0) the output is not gated; how z is stored comes last in `stored`."""


@inline
def _place_of_panel(
    scratch: Any, state: Any, row: int, p: int, d: int, d_v: int, n: int, columns: int, width: int
) -> tuple[Any, int]:
    """(pointer, distance of rows) of the state of the panel at column p of a task.

    The tiles of one step go over the new state itself, those of a longer scan over scratch.
    """
    if n == 1 and columns == width:
        return shifted(state, row + p), d_v
    return shifted(scratch, d * p), width


@cache
def forward_kernel(dtype: str, by_channel: bool) -> Any:
    """Compile `forward(first, last, records)`: tasks first to last − 1 of batch · heads · parts of a head."""
    lanes, kind, zero = element(dtype)
    byte = np.uint8(0)
    panel = PANEL_VECTORS * lanes
    advance = advance_panel(by_channel)
    name = f"outer scan {dtype}{' by channel' * by_channel}"

    @compiled(name, FORWARD_RECORD)
    def forward(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, heads, d, d_v, reverse = f.n, f.heads, f.d, f.d_v, f.reverse
        q, k, v, g = pointer(f.q, zero), pointer(f.k, zero), pointer(f.v, zero), pointer(f.g, zero)
        weight, skip, resets = pointer(f.weight, zero), pointer(f.skip, zero), pointer(f.resets, byte)
        initial_state, bonus = pointer(f.initial_state, zero), pointer(f.bonus, zero)
        o, state = pointer(f.o, zero), pointer(f.state, zero)
        scale, has_bonus = pointer(f.numbers, zero)[0], f.bonus != 0
        kinds, z, z_as = kinds_of(f.stored), pointer(f.z, zero), stored_as(f.stored, Z)
        most = f.panels * panel  # columns of a task
        parts = -(-d_v // most)
        shared = heads // f.groups
        d_whole = -(-d // lanes) * lanes
        factors = d_whole if by_channel else 1  # numbers of each step
        q_first, q_step = along(f.q_step, n, reverse)
        k_first, k_step = along(f.k_step, n, reverse)
        v_first, v_step = along(f.v_step, n, reverse)
        g_first, g_step = along(f.g_step, n, reverse)
        weight_first, weight_step = along(f.weight_step, n, reverse)
        resets_first, resets_step = along(f.resets_step, n, reverse)
        o_first, o_step = along(heads * d_v, n, reverse)
        z_first, z_step = along(f.z_step, n, reverse)

        sizes = (
            *(lanes, d * most, BLOCK * panel, BLOCK * panel, BLOCK * factors + lanes, BLOCK * factors + lanes),
            *(d_whole, most, BLOCK * d, BLOCK * d),
        )
        buffer = np.empty(room(sizes), kind)
        modes = np.empty(room((BLOCK,)), np.int64)
        edge, scratch, u, out, factor, keep, extra, factor_of_v, queries, keys = cut(buffer, sizes)
        (mode,) = cut(modes, (BLOCK,))
        for task in range(first, last):
            item, head, c0 = task // parts // heads, task // parts % heads, task % parts * most
            of_task = min(most, d_v - c0)
            q_row = item * f.q_item + head // shared * f.q_head + q_first
            k_row = item * f.k_item + head // shared * f.k_head + k_first
            v_row = item * f.v_item + head * f.v_head + v_first + c0
            g_row = item * f.g_item + head * f.g_head + g_first
            weight_row = item * f.weight_item + head * f.weight_head + weight_first
            resets_row = item * f.resets_item + resets_first
            z_row = item * f.z_item + head * f.z_head + z_first + c0
            o_row = (item * n * heads + head) * d_v + o_first + c0
            state_row = (item * heads + head) * d * d_v + c0

            for p in range(0, of_task, panel):
                columns = min(panel, of_task - p)
                width = -(-columns // lanes) * lanes
                S, pitch = _place_of_panel(scratch, state, state_row, p, d, d_v, n, columns, width)
                if f.initial_state == 0:
                    for r in range(d):
                        for c in range(0, width, lanes):
                            store(S, r * pitch + c, zeros(edge))
                else:
                    at = item * f.state_item + head * f.state_head + (c0 + p) * f.state_column
                    matrix = shifted(initial_state, at)
                    load_state(matrix, f.state_row, f.state_column, d, columns, lanes, edge, S, pitch)
            if f.skip != 0:
                for c in range(of_task):
                    factor_of_v[c] = skip[head * f.skip_head + (c0 + c) * f.skip_column]
            if has_bonus:
                load_padded_row(bonus, item * f.bonus_item + head * d, d, lanes, extra)
            if f.g == 0:  # S + 0 · S
                clear(factor, BLOCK * factors)
                for i in range(BLOCK):
                    mode[i] = NEAR

            for start in range(0, n, BLOCK):
                count = min(BLOCK, n - start)
                if f.g != 0:
                    at = g_row + start * g_step
                    if by_channel:
                        decays_of_channels(g, kinds.g, at, g_step, count, d, lanes, d_whole, edge, factor, keep, mode)
                    else:
                        decays_of_head(g, kinds.g, at, g_step, count, lanes, factor, keep, mode)
                elif f.resets != 0:
                    for i in range(count):
                        mode[i] = NEAR
                if f.resets != 0:
                    cut_at_resets(resets, resets_row + start * resets_step, resets_step, count, factors, factor, mode)
                query_rows, q_pace = rows_of(q, kinds.q, q_row + start * q_step, q_step, count, d, lanes, queries)
                key_rows, k_pace = rows_of(k, kinds.k, k_row + start * k_step, k_step, count, d, lanes, keys)
                for p in range(0, of_task, panel):
                    columns = min(panel, of_task - p)
                    width = -(-columns // lanes) * lanes
                    S, pitch = _place_of_panel(scratch, state, state_row, p, d, d_v, n, columns, width)
                    for i in range(count):
                        at = v_row + p + (start + i) * v_step
                        own = zeros(edge)  # Σ_c q[c] bonus[c] k[c]
                        if has_bonus:
                            for c in range(0, d, lanes):
                                query = load_part(query_rows, i * q_pace + c, d - c, lanes, edge)
                                key = load_part(key_rows, i * k_pace + c, d - c, lanes, edge)
                                own = own + query * load(extra, c) * key
                        own_sum = total(own)
                        factor_of_u = zero + 1
                        if f.weight != 0:
                            factor_of_u = number_at(weight, kinds.weight, weight_row + (start + i) * weight_step)
                        for c in range(0, width, lanes):
                            x = load_stored_part(v, kinds.v, at + c, columns - c, lanes, edge)
                            if f.weight != 0:
                                x = x * factor_of_u
                            store(u, i * width + c, x)
                            if has_bonus:
                                store(out, i * width + c, x * own_sum)
                            else:
                                store(out, i * width + c, zeros(edge))
                    advance(
                        key_rows, k_pace, query_rows, q_pace, factor, keep, factors, mode, u, out, width, pitch, count,
                        lanes, d, S, has_bonus,
                    )  # fmt: skip
                    for i in range(count if f.o != 0 else 0):
                        for c in range(0, width, lanes):
                            value = load(out, i * width + c) * scale
                            if f.skip != 0:
                                at = v_row + p + (start + i) * v_step + c
                                x = load_stored_part(v, kinds.v, at, columns - c, lanes, edge)
                                value = value + load(factor_of_v, p + c) * x
                            if f.z != 0:
                                at = z_row + p + (start + i) * z_step + c
                                gate = load_stored_part(z, z_as, at, columns - c, lanes, edge)
                                value = value * (gate * sigmoid(gate))
                            at = o_row + p + (start + i) * o_step + c
                            store_stored_part(o, kinds.o, at, value, columns - c, lanes, edge)
            for p in range(0, of_task, panel):
                columns = min(panel, of_task - p)
                width = -(-columns // lanes) * lanes
                S, pitch = _place_of_panel(scratch, state, state_row, p, d, d_v, n, columns, width)
                for r in range(d if n > 1 or columns < width else 0):
                    for c in range(0, width, lanes):
                        at = state_row + r * d_v + p + c
                        store_part(state, at, load(S, r * width + c), columns - c, lanes, edge)
        modes[0] = 0
        return DONE

    return forward
