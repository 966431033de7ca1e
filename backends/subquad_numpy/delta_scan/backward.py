"""The gradient of the scan of the delta rule; a task is a head of a batch item.

With G[t] the gradient by S[t], which has scale q[t] ∂o[t]ᵀ, and k' = w[t] ∘ k[t] for the delta rule,

    ∂x = G[t]ᵀ k,    ∂v = β ∂x,    ∂u = −β ∂x,    ∂β = ∂x · (v − u),    ∂q = scale S[t] ∂o
    G[t−1] = w[t] ∘ (G[t] + k ∂uᵀ),    ∂k = G[t] x + w[t] ∘ S[t−1] ∂u,    ∂w = Σ S[t−1] ∘ (G[t] + k ∂uᵀ)

and for the general form

    ∂u = G[t]ᵀ b,    ∂v = G[t]ᵀ k,    ∂k = G[t] v,    ∂b = G[t] u,    ∂a = S[t−1] ∂u,    ∂w = Σ S[t−1] ∘ G[t]
    G[t−1] = w[t] ∘ G[t] + a ∂uᵀ

One pass over the rows of G and S[t−1] does step t, adds what step t − 1 reads to G[t−1], and begins the products of
that step. The states are computed again: from checkpoints of segments those of tiles, from these each state of a tile.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import copy, cut, load, merged, pointer, room, shifted, spread, store, total, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.stored import (
    load_stored_part,
    number_at,
    put_number,
    row_of,
    store_stored_part,
)
from subquad_numpy.delta_scan.decays import (
    CHANNELS,
    CHANNELS_NEAR,
    HEAD_FAR,
    HEAD_NEAR,
    NONE,
    decayed,
    load_gate,
    load_gates,
)
from subquad_numpy.delta_scan.forward import GATES, load_tile, store_tile
from subquad_numpy.delta_scan.layout import BLOCK, HEAD, Kinds, arrays_of, kinds_of, task_of
from subquad_numpy.delta_scan.walk import scratch_sizes, walk
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.runtime.stored import STORED_BITS

OF_INPUTS = ("q", "k", "v", "g", "beta", "a", "b", "initial_state")  # each gradient is optional
BACKWARD_RECORD = fields(
    HEAD,
    {"tile": None, "segment": None},
    dict.fromkeys(("grad_o", "grad_state", *(f"grad_{name}" for name in OF_INPUTS)), 0),
)
"""`tile` is the steps of a tile, `segment` the tiles of a segment. Without `grad_o` or `grad_state` it is 0."""
OUTPUT_BITS = STORED_BITS * len(Kinds._fields)  # of `stored`: how the gradients are stored comes behind them
CUT = -1  # the mode of a step before which the state is set to 0: nothing of it goes back


@cache
def backward_kernel(dtype: str, gate: str, general: bool) -> Any:
    """Compile `backward(first, last, records)`; `gate` is one of `GATES`."""
    lanes, kind, zero = element(dtype)
    which, width = GATES.index(gate), 2 * lanes
    form = "general" if general else "delta"

    @compiled(f"delta scan gradient {dtype} {gate} {form}", BACKWARD_RECORD)
    def backward(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, heads, d, d_v, reverse, steps, in_segment = f.n, f.heads, f.d, f.d_v, f.reverse, f.tile, f.segment
        x = arrays_of(f, zero)
        has_resets, scale = f.resets != 0, pointer(f.numbers, zero)[0]
        initial_state, has_state = pointer(f.initial_state, zero), f.initial_state != 0
        grad_o, has_o = pointer(f.grad_o, zero), f.grad_o != 0
        grad_state, has_grad = pointer(f.grad_state, zero), f.grad_state != 0
        grad_q, grad_k, grad_v = pointer(f.grad_q, zero), pointer(f.grad_k, zero), pointer(f.grad_v, zero)
        grad_g, grad_beta = pointer(f.grad_g, zero), pointer(f.grad_beta, zero)
        grad_a, grad_b = pointer(f.grad_a, zero), pointer(f.grad_b, zero)
        grad_initial_state = pointer(f.grad_initial_state, zero)
        wants_q, wants_k, wants_v, wants_g = f.grad_q != 0, f.grad_k != 0, f.grad_v != 0, f.grad_g != 0
        wants_beta, wants_a, wants_b = f.grad_beta != 0, f.grad_a != 0, f.grad_b != 0

        tiles = -(-n // steps)
        segments = -(-tiles // in_segment)
        pairs = -(-d_v // width)  # a state lies as (pairs of vectors, d, pair)
        block, size, wide = d * width, -(-d // lanes) * lanes, pairs * width
        whole = pairs * block
        sizes = (
            lanes,
            (segments + in_segment + steps + 1) * whole + (steps + 6) * wide + 19 * size,
            *scratch_sizes(which, general, pairs, d, lanes, f.stored),
        )
        buffer, modes = np.empty(room(sizes), kind), np.empty(room((BLOCK + 1,)), np.int64)
        # the state before each segment stands first in what follows
        edge, of_segments, products, decays, rows_k, rows_q, rows_a, rows_b = cut(buffer, sizes)
        (of_steps,) = cut(modes, (BLOCK + 1,))
        scratch = products, decays, rows_k, rows_q, rows_a, rows_b, of_steps
        of_tiles = shifted(of_segments, segments * whole)  # the state before each tile of a segment
        states = shifted(of_tiles, in_segment * whole)  # the state after each step of a tile
        G = shifted(states, steps * whole)
        found = shifted(G, whole)  # v − u of each step of a tile; u in the general form
        to_x = shifted(found, steps * wide)  # ∂x; ∂u in the general form
        to_v = shifted(to_x, wide)  # ∂v, in the general form
        by_u = shifted(to_v, wide)  # ∂u
        of_k = shifted(by_u, wide)  # what k is multiplied with in the update: x, or v
        of_b = shifted(of_k, wide)  # u, in the general form
        by_o = shifted(of_b, wide)  # scale ∂o of the step before
        sums = shifted(by_o, wide)  # ∂q of the step before; then S ∂u, Σ S ∘ (…), G x or G v, and G u
        nothing = shifted(sums, 5 * size)  # zeros, the rows of a step that does not exist
        gates = shifted(nothing, size)
        rows_wide = shifted(gates, 8 * size)  # rows of half precision, widened
        k_wide, q_wide = shifted(rows_wide, size), shifted(rows_wide, 2 * size)
        k_before_wide, b_before_wide = shifted(rows_wide, 3 * size), shifted(rows_wide, 4 * size)
        kinds, by_kinds = kinds_of(f.stored), kinds_of(f.stored >> OUTPUT_BITS)

        for number in range(first, last):
            item, head = number // heads, number % heads
            task = task_of(item, head, n, heads, reverse)
            clear(sums, 6 * size)  # and `nothing`; sums beyond the last channel stay 0
            clear(to_x, 2 * wide)
            for p in range(pairs):
                count, index = d_v - p * width, number * d * d_v + p * width
                before, by_state = shifted(of_segments, p * block), shifted(G, p * block)
                load_tile(initial_state, has_state, index, d, d_v, count, lanes, before, edge)
                load_tile(grad_state, has_grad, index, d, d_v, count, lanes, by_state, edge)

            # The first sweeps go forward, and leave the state before each segment; the others go back. Within a segment
            # the first moves go forward, and leave the state before each tile; the others go back.
            for sweep in range(2 * segments - 1):
                goes_back = sweep >= segments - 1
                segment = 2 * segments - 2 - sweep if goes_back else sweep
                here = min(in_segment, tiles - segment * in_segment)
                if goes_back:
                    copy(shifted(of_segments, segment * whole), whole, of_tiles)
                for move in range(2 * here - 1 if goes_back else 1):
                    in_tile = goes_back and move >= here - 1
                    tile = 2 * here - 2 - move if in_tile else move
                    begin = (segment * in_segment + tile) * steps
                    end = min(n, begin + steps)
                    before = shifted(of_tiles, tile * whole)
                    after = states if in_tile else shifted(before, whole)
                    if not goes_back:
                        before = shifted(of_segments, segment * whole)
                        after, end = shifted(before, whole), begin + in_segment * steps
                    walk(
                        which, general, False, x, kinds, has_resets, task, begin, end, n, d, d_v, 0, pairs, lanes,
                        before, after, whole if in_tile else 0, x.v, zero, found, wide if in_tile else 0, scratch, edge,
                    )  # fmt: skip
                    if not in_tile:
                        continue

                    # step n does not exist: it only adds to G what step n − 1 reads
                    for t in range(end if end == n else end - 1, begin - 1, -1):
                        row, earlier = task.row + t * task.forth, task.row + (t - 1) * task.forth
                        S = shifted(states, (t - 1 - begin) * whole) if t > begin else before
                        mode, factor, w, strength = NONE, zeros(edge), zeros(edge), zeros(edge)
                        to_beta = zeros(edge)
                        k = nothing
                        if t < n:
                            if general:
                                k = row_of(x.a, kinds.a, row * d, d, lanes, k_wide)
                            else:
                                k = row_of(x.k, kinds.k, row * d, d, lanes, k_wide)
                                strength = strength + number_at(x.beta, kinds.beta, row)
                            if which == 1:
                                factor, w, mode = load_gate(x.g, kinds.g, row)
                            elif which == 2:
                                key = k
                                if general:
                                    key = row_of(x.k, kinds.k, row * d, d, lanes, q_wide)
                                mode = load_gates(x.g, kinds.g, row * d, key, d, lanes, gates, edge)
                            if has_resets and x.resets[task.mark + t * task.mark_forth] != 0:
                                mode = CUT
                        for j in range(0, wide, lanes):
                            count = d_v - j
                            store(by_o, j, zeros(edge))
                            if has_o and t > 0:
                                out = load_stored_part(grad_o, kinds.o, earlier * d_v + j, count, lanes, edge)
                                store(by_o, j, out * scale)
                            store(by_u, j, zeros(edge))
                            store(of_k, j, zeros(edge))
                            if t < n:
                                value = load(found, (t - begin) * wide + j)
                                by_x = load(to_x, j)
                                if general:
                                    store(by_u, j, by_x)
                                    store(of_b, j, value)
                                    store(of_k, j, load_stored_part(x.v, kinds.v, row * d_v + j, count, lanes, edge))
                                    by_v = load(to_v, j)
                                else:
                                    to_beta = by_x * value + to_beta
                                    by_v = strength * by_x
                                    store(by_u, j, -by_v)
                                    store(of_k, j, strength * value)
                                if wants_v and count > 0:
                                    store_stored_part(grad_v, by_kinds.v, row * d_v + j, by_v, count, lanes, edge)
                            store(to_x, j, zeros(edge))
                            store(to_v, j, zeros(edge))
                        q_before, k_before, b_before = nothing, nothing, nothing
                        if t > 0:
                            q_before = row_of(x.q, kinds.q, earlier * d, d, lanes, q_wide)
                            k_before = row_of(x.k, kinds.k, earlier * d, d, lanes, k_before_wide)
                            b_before = k_before
                            if general:
                                b_before = row_of(x.b, kinds.b, earlier * d, d, lanes, b_before_wide)
                        rows = k, q_before, k_before, b_before
                        columns = by_u, of_k, of_b, by_o, to_x, to_v
                        if mode == NONE:
                            _pass_back(NONE, which, general, G, S, d, pairs, lanes, factor, gates, rows, columns, sums)
                        elif mode == CUT:
                            _pass_back(CUT, which, general, G, S, d, pairs, lanes, factor, gates, rows, columns, sums)
                        elif mode == HEAD_NEAR and which == 1:
                            _pass_back(
                                HEAD_NEAR, which, general, G, S, d, pairs, lanes, factor, gates, rows, columns, sums
                            )
                        elif mode == HEAD_FAR and which == 1:
                            _pass_back(
                                HEAD_FAR, which, general, G, S, d, pairs, lanes, factor, gates, rows, columns, sums
                            )
                        elif mode == CHANNELS_NEAR and which == 2:
                            _pass_back(
                                CHANNELS_NEAR, which, general, G, S, d, pairs, lanes, factor, gates, rows, columns, sums
                            )
                        elif which == 2:
                            _pass_back(
                                CHANNELS, which, general, G, S, d, pairs, lanes, factor, gates, rows, columns, sums
                            )

                        if t < n and wants_beta:
                            put_number(grad_beta, by_kinds.beta, row, total(to_beta))
                        over_gates = zeros(edge)
                        for i in range(0, d, lanes):
                            count = d - i
                            if t > 0 and wants_q:
                                by_q = load(sums, i)
                                store_stored_part(grad_q, by_kinds.q, earlier * d + i, by_q, count, lanes, edge)
                            if t == n:
                                continue
                            by_a, by_w, by_k = load(sums, size + i), load(sums, 2 * size + i), load(sums, 3 * size + i)
                            if which == 2:
                                w = load(gates, 3 * size + i)
                            if general:
                                if wants_a:
                                    store_stored_part(grad_a, by_kinds.a, row * d + i, by_a, count, lanes, edge)
                                if wants_b:
                                    by_b = load(sums, 4 * size + i)
                                    store_stored_part(grad_b, by_kinds.b, row * d + i, by_b, count, lanes, edge)
                            else:
                                by_k = by_k + (by_a if which == 0 else w * by_a)
                            if wants_k:
                                store_stored_part(grad_k, by_kinds.k, row * d + i, by_k, count, lanes, edge)
                            if which == 2 and wants_g:
                                store_stored_part(grad_g, by_kinds.g, row * d + i, w * by_w, count, lanes, edge)
                            over_gates = over_gates + by_w
                        if which == 1 and wants_g and t < n:
                            put_number(grad_g, by_kinds.g, row, total(w * over_gates))

            if f.grad_initial_state != 0:
                for p in range(pairs):
                    count, index = d_v - p * width, number * d * d_v + p * width
                    store_tile(grad_initial_state, index, d, d_v, count, lanes, shifted(G, p * block), edge)
        modes[0] = 0
        return DONE

    return backward


@merged
def _pass_back(
    mode: int, gate: int, general: bool, G: Any, S: Any, d: int, pairs: int, lanes: int, factor: Any, gates: Any,
    rows: Any, columns: Any, sums: Any,
) -> None:  # fmt: skip
    """Take the rows of G from step t to the one before, and add up what the gradients of the rows need."""
    k, q_before, k_before, b_before = rows
    by_u, of_k, of_b, by_o, to_x, to_v = columns
    size, width = -(-d // lanes) * lanes, 2 * lanes
    block = d * width
    keep = factor
    for i in range(d):
        if mode in (CHANNELS_NEAR, CHANNELS):
            factor, keep = spread(gates, i), spread(gates, size + i)
        key, query, next_b = spread(k, i), spread(q_before, i), spread(b_before, i)
        next_k = spread(k_before, i)
        to_q, to_a, to_w, to_k, to_b = zeros(G), zeros(G), zeros(G), zeros(G), zeros(G)
        for j in range(0, pairs * width, lanes):
            at = j // width * block + i * width + j % width
            g, s, du, do = load(G, at), load(S, at), load(by_u, j), load(by_o, j)
            to_k = g * load(of_k, j) + to_k
            if general:
                to_b = g * load(of_b, j) + to_b
            elif mode != CUT:
                g = key * du + g
            if mode == CUT:
                g = query * do
            else:
                to_a = s * du + to_a
                if gate != 0:
                    to_w = s * g + to_w
                g = decayed(mode, g, factor, keep)
                if general:
                    g = key * du + g
                g = query * do + g
            store(G, at, g)
            to_q = s * do + to_q
            store(to_x, j, next_b * g + load(to_x, j))
            if general:
                store(to_v, j, next_k * g + load(to_v, j))
        sums[i] = total(to_q)
        sums[size + i] = total(to_a)
        sums[2 * size + i] = total(to_w)
        sums[3 * size + i] = total(to_k)
        if general:
            sums[4 * size + i] = total(to_b)
