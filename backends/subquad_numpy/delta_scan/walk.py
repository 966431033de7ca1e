"""The walk of a tile of the state through time, which the scan and its gradient have in common.

    S[t] = diag(w[t]) S[t-1] + k[t] x[t]ᵀ                        x[t] = β[t] (v[t] - S[t-1]ᵀ (w[t] ∘ k[t]))
    S[t] = diag(w[t]) S[t-1] + b[t] u[t]ᵀ + k[t] v[t]ᵀ           u[t] = S[t-1]ᵀ a[t]

Columns do not depend on one another. A tile of the state, (d, two vectors), stays in the first-level cache, and
one pass over its rows per step does all: it decays and updates a row, adds the row to the output, and adds it to the
product with the key of the next step, which that step begins with. Tiles go through time in blocks of `BLOCK` steps:
the decays of a block, and its rows that are widened, are found once for all tiles.
"""

from typing import Any

from subquad_numpy.codegen import copy, inline, load, merged, shifted, spread, store, zeros
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.stored import (
    load_stored_part,
    number_at,
    prefetch_stored,
    rows_of,
    store_stored_part,
)
from subquad_numpy.delta_scan.decays import (
    CHANNELS,
    CHANNELS_NEAR,
    HEAD_FAR,
    HEAD_NEAR,
    NONE,
    decayed,
    load_gates,
    load_gates_of_head,
)
from subquad_numpy.delta_scan.layout import BLOCK
from subquad_numpy.runtime.stored import AS_COMPUTED

STEPS_AHEAD = 2  # the rows that are prefetched are so many steps of time ahead; a block, where they are widened


@inline
def scratch_sizes(gate: int, general: bool, tiles: int, d: int, lanes: int, stored: int) -> Any:
    """The sizes of the scratch of `walk`: of products of tiles, decays, and rows of k, q, a and b that are widened."""
    size = -(-d // lanes) * lanes
    decays = 4 * (BLOCK + 1) * size if gate == 2 else 4 * BLOCK
    row = (BLOCK + 1) * size if stored != 0 else 0
    of_general = row if general else 0
    return 2 * tiles * lanes, decays, row, row, of_general, of_general


@merged
def walk(
    gate: int, general: bool, reads: bool, x: Any, kinds: Any, has_resets: bool, task: Any, first: int, last: int,
    n: int, d: int, d_v: int, c0: int, tiles: int, lanes: int, before: Any, after: Any, stride: int, o: Any, scale: Any,
    found: Any, found_step: int, scratch: Any, edge: Any,
) -> None:  # fmt: skip
    """Walk tiles, one behind the other, through steps first … last − 1: from the states `before` to `after`.

    With `stride`, the state after each step is kept, so many numbers behind the one before. `gate` is 0, 1 or 2 for no
    decay, one of the head, one of each channel. With `reads`, outputs are written to `o`; without, v − u of each step
    (u in the general form) is written to `found`, whose steps are `found_step` apart. `scratch` is the parts of
    `scratch_sizes`, and behind them `BLOCK` + 1 integers.
    """
    width, size, forth = 2 * lanes, -(-d // lanes) * lanes, task.forth
    of_gate = 4 * size  # numbers of the decays of each step
    products, gates, wide, wide_q, wide_a, wide_b, modes = scratch
    steps_ahead = STEPS_AHEAD if kinds.k == AS_COMPUTED else BLOCK
    for start in range(first, last, BLOCK):
        end, begin = min(start + BLOCK, last), task.row + start * forth
        steps, keys_read = end - start, min(end + 1, n) - start  # a step reads the key of the next one too
        at, pace = begin * d, forth * d
        keys, k_pace = rows_of(x.k, kinds.k, at, pace, keys_read, d, lanes, wide)
        queries, q_pace, others, b_pace, readers, a_pace = keys, k_pace, keys, k_pace, keys, k_pace
        if reads:
            queries, q_pace = rows_of(x.q, kinds.q, at, pace, steps, d, lanes, wide_q)
        if general:
            readers, a_pace = rows_of(x.a, kinds.a, at, pace, keys_read, d, lanes, wide_a)
            others, b_pace = rows_of(x.b, kinds.b, at, pace, steps, d, lanes, wide_b)
        if gate == 1:
            load_gates_of_head(x.g, kinds.g, begin, forth, steps, lanes, gates, modes)
        if gate == 2:
            if start > first:
                copy(shifted(gates, BLOCK * of_gate), of_gate, gates)
                modes[0] = modes[BLOCK]
            for i in range(1 if start > first else 0, keys_read):
                own_gates, key = shifted(gates, i * of_gate), shifted(keys, i * k_pace)
                modes[i] = load_gates(x.g, kinds.g, at + i * pace, key, d, lanes, own_gates, edge)
            if not general:
                readers, a_pace = shifted(gates, 2 * size), of_gate

        for tile in range(tiles):
            c, of_tile = c0 + tile * width, tile * d * width
            count = d_v - c
            old, new = shifted(before, of_tile), shifted(after, (start - first) * stride + of_tile)
            u0, u1 = load(products, tile * width), load(products, tile * width + lanes)
            if start > first:
                old = shifted(new, -stride)
            else:
                u0, u1 = zeros(edge), zeros(edge)
                for i in range(d):
                    u0 = spread(readers, i) * load(old, i * width) + u0
                    u1 = spread(readers, i) * load(old, i * width + lanes) + u1
            for t in range(start, end):
                own, following, row = t - start, min(t + 1, n - 1) - start, task.row + t * forth
                if has_resets and x.resets[task.mark + t * task.mark_forth] != 0:
                    clear(new, d * width)
                    old = new
                    u0, u1 = zeros(edge), zeros(edge)
                ahead = row + steps_ahead * forth
                prefetch_stored(x.v, kinds.v, ahead * d_v + c)
                if tile == 0 or kinds.k == AS_COMPUTED:
                    for i in range(0, d, lanes):
                        prefetch_stored(x.k, kinds.k, ahead * d + i)
                        if reads:
                            prefetch_stored(x.q, kinds.q, ahead * d + i)
                x0 = load_stored_part(x.v, kinds.v, row * d_v + c, count, lanes, edge)
                x1 = load_stored_part(x.v, kinds.v, row * d_v + c + lanes, count - lanes, lanes, edge)
                factor, mode = zeros(edge), NONE
                if gate != 0:
                    mode = modes[own]
                if gate == 1:
                    factor = spread(gates, own)
                    if not general:
                        w = spread(gates, BLOCK + own)
                        u0, u1 = w * u0, w * u1
                if not general:
                    x0, x1 = x0 - u0, x1 - u1
                if not reads:
                    place = (t - first) * found_step + tile * width
                    store(found, place, u0 if general else x0)
                    store(found, place + lanes, u1 if general else x1)
                if not general:
                    strength = number_at(x.beta, kinds.beta, row)
                    x0, x1 = strength * x0, strength * x1
                rows = (
                    shifted(queries, own * q_pace), shifted(keys, own * k_pace), shifted(others, own * b_pace),
                    shifted(readers, following * a_pace),
                )  # fmt: skip
                of_step = gates if gate != 2 else shifted(gates, own * of_gate)
                given = u0, u1, x0, x1
                o0, o1 = zeros(edge), zeros(edge)
                if gate == 0:
                    o0, o1, u0, u1 = _pass(NONE, general, reads, old, new, d, lanes, factor, of_step, rows, given)
                elif mode == HEAD_NEAR:
                    o0, o1, u0, u1 = _pass(HEAD_NEAR, general, reads, old, new, d, lanes, factor, of_step, rows, given)
                elif mode == HEAD_FAR:
                    o0, o1, u0, u1 = _pass(HEAD_FAR, general, reads, old, new, d, lanes, factor, of_step, rows, given)
                elif mode == CHANNELS_NEAR:
                    o0, o1, u0, u1 = _pass(
                        CHANNELS_NEAR, general, reads, old, new, d, lanes, factor, of_step, rows, given
                    )
                else:
                    o0, o1, u0, u1 = _pass(CHANNELS, general, reads, old, new, d, lanes, factor, of_step, rows, given)
                if reads:
                    store_stored_part(o, kinds.o, row * d_v + c, o0 * scale, count, lanes, edge)
                    if count > lanes:
                        store_stored_part(o, kinds.o, row * d_v + c + lanes, o1 * scale, count - lanes, lanes, edge)
                old, new = new, shifted(new, stride)
            store(products, tile * width, u0)
            store(products, tile * width + lanes, u1)


@merged
def _pass(
    mode: int, general: bool, reads: bool, before: Any, tile: Any, d: int, lanes: int, factor: Any,
    gates: Any, rows: Any, given: Any,
) -> Any:  # fmt: skip
    """Advance the rows of a tile by one step: the output, and the product with the key of the next step."""
    q, k, b, after = rows
    u0, u1, x0, x1 = given
    o0, o1, n0, n1 = zeros(tile), zeros(tile), zeros(tile), zeros(tile)
    width, size = 2 * lanes, -(-d // lanes) * lanes
    keep = factor
    for i in range(d):
        if mode >= CHANNELS_NEAR:
            factor, keep = spread(gates, i), spread(gates, size + i)
        key, query, next_key = spread(k, i), spread(q, i), spread(after, i)
        s0 = decayed(mode, load(before, i * width), factor, keep)
        s1 = decayed(mode, load(before, i * width + lanes), factor, keep)
        if general:
            s0, s1 = spread(b, i) * u0 + s0, spread(b, i) * u1 + s1
        s0, s1 = key * x0 + s0, key * x1 + s1
        store(tile, i * width, s0)
        store(tile, i * width + lanes, s1)
        if reads:
            o0, o1 = query * s0 + o0, query * s1 + o1
        n0, n1 = next_key * s0 + n0, next_key * s1 + n1
    return o0, o1, n0, n1
