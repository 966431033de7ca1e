"""The walk of a tile of the state through time, which the scan and its gradient have in common.

    S[t] = diag(w[t]) S[t-1] + k[t] x[t]ᵀ                        x[t] = β[t] (v[t] - S[t-1]ᵀ (w[t] ∘ k[t]))
    S[t] = diag(w[t]) S[t-1] + b[t] u[t]ᵀ + k[t] v[t]ᵀ           u[t] = S[t-1]ᵀ a[t]

Columns do not depend on one another. A tile of the state, (d, two vectors), stays in the first-level cache, and
one pass over its rows per step does all: it decays and updates a row, adds the row to the output, and adds it to the
product with the key of the next step, which that step begins with.
"""

from typing import Any

from subquad_numpy.codegen import load, merged, shifted, spread, store, zeros
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.stored import (
    load_stored_part,
    number_at,
    prefetch_stored,
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

STEPS_AHEAD = 2  # the rows that are prefetched are so many steps of time ahead


@merged
def walk(
    gate: int, general: bool, reads: bool, x: Any, kinds: Any, has_resets: bool, task: Any, first: int, last: int,
    n: int, d: int, d_v: int, c0: int, lanes: int, before: Any, tile: Any, stride: int, o: Any, scale: Any, found: Any,
    found_step: int, gates: Any, wide: Any, edge: Any,
) -> None:  # fmt: skip
    """Walk a tile through steps first … last − 1: from the state `before` to `tile`, and on in place.

    With `stride`, the state after each step is kept, so many numbers behind the one before. `gate` is 0, 1 or 2 for no
    decay, one of the head, one of each channel. With `reads`, outputs are written to `o`; without, v − u of each step
    (u in the general form) is written to `found`, whose steps are `found_step` apart. `gates` is scratch of 8 d
    numbers, padded, and `wide` of 5 d, for rows that are widened.
    """
    width, size = 2 * lanes, -(-d // lanes) * lanes
    count = d_v - c0
    gates_next = shifted(gates, 4 * size)
    wide_next, wide_q, wide_a, wide_b = (
        shifted(wide, size), shifted(wide, 2 * size), shifted(wide, 3 * size), shifted(wide, 4 * size)
    )  # fmt: skip
    row = task.row + first * task.forth
    mode = NONE
    key = row_of(x.k, kinds.k, row * d, d, lanes, wide)
    if gate == 2:
        mode = load_gates(x.g, kinds.g, row * d, key, d, lanes, gates, edge)
    now = row_of(x.a, kinds.a, row * d, d, lanes, wide_a) if general else key
    if gate == 2 and not general:
        now = shifted(gates, 2 * size)
    u0, u1 = zeros(edge), zeros(edge)
    for i in range(d):
        u0 = spread(now, i) * load(before, i * width) + u0
        u1 = spread(now, i) * load(before, i * width + lanes) + u1

    for t in range(first, last):
        if has_resets and x.resets[task.mark + t * task.mark_forth] != 0:
            clear(tile, d * width)
            before = tile
            u0, u1 = zeros(edge), zeros(edge)
        following = row + task.forth if t < n - 1 else row
        ahead = row + STEPS_AHEAD * task.forth
        prefetch_stored(x.v, kinds.v, ahead * d_v + c0)
        for i in range(0, d, lanes):
            prefetch_stored(x.k, kinds.k, ahead * d + i)
            if reads:
                prefetch_stored(x.q, kinds.q, ahead * d + i)
        mode_next = NONE
        next_key = row_of(x.k, kinds.k, following * d, d, lanes, wide_next)
        if gate == 2:
            mode_next = load_gates(x.g, kinds.g, following * d, next_key, d, lanes, gates_next, edge)
        after = row_of(x.a, kinds.a, following * d, d, lanes, wide_a) if general else next_key
        if gate == 2 and not general:
            after = shifted(gates_next, 2 * size)

        x0 = load_stored_part(x.v, kinds.v, row * d_v + c0, count, lanes, edge)
        x1 = load_stored_part(x.v, kinds.v, row * d_v + c0 + lanes, count - lanes, lanes, edge)
        factor = zeros(edge)
        if gate == 1:
            factor, w, mode = load_gate(x.g, kinds.g, row)
            if not general:
                u0, u1 = w * u0, w * u1
        if not general:
            x0, x1 = x0 - u0, x1 - u1
        if not reads:
            place = (t - first) * found_step
            store(found, place, u0 if general else x0)
            store(found, place + lanes, u1 if general else x1)
        if not general:
            strength = number_at(x.beta, kinds.beta, row)
            x0, x1 = strength * x0, strength * x1
        query = row_of(x.q, kinds.q, row * d, d, lanes, wide_q) if reads else key
        other = row_of(x.b, kinds.b, row * d, d, lanes, wide_b) if general else key
        rows = query, key, other, after
        given = u0, u1, x0, x1
        o0, o1 = zeros(edge), zeros(edge)
        if gate == 0:
            o0, o1, u0, u1 = _pass(NONE, general, reads, before, tile, d, lanes, factor, gates, rows, given)
        elif mode == HEAD_NEAR:
            o0, o1, u0, u1 = _pass(HEAD_NEAR, general, reads, before, tile, d, lanes, factor, gates, rows, given)
        elif mode == HEAD_FAR:
            o0, o1, u0, u1 = _pass(HEAD_FAR, general, reads, before, tile, d, lanes, factor, gates, rows, given)
        elif mode == CHANNELS_NEAR:
            o0, o1, u0, u1 = _pass(CHANNELS_NEAR, general, reads, before, tile, d, lanes, factor, gates, rows, given)
        else:
            o0, o1, u0, u1 = _pass(CHANNELS, general, reads, before, tile, d, lanes, factor, gates, rows, given)
        if reads:
            store_stored_part(o, kinds.o, row * d_v + c0, o0 * scale, count, lanes, edge)
            if count > lanes:
                store_stored_part(o, kinds.o, row * d_v + c0 + lanes, o1 * scale, count - lanes, lanes, edge)
        gates, gates_next, mode = gates_next, gates, mode_next
        key, wide, wide_next = next_key, wide_next, wide
        before, tile = tile, shifted(tile, stride)
        row = following


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
