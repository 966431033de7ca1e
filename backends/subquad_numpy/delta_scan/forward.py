"""The scan of the delta rule; a task is a tile of columns (channels of values) of one head of one batch item.

    S[t] = diag(w[t]) S[t-1] + k[t] x[t]ᵀ                        x[t] = β[t] (v[t] - S[t-1]ᵀ (w[t] ∘ k[t]))
    S[t] = diag(w[t]) S[t-1] + b[t] u[t]ᵀ + k[t] v[t]ᵀ           u[t] = S[t-1]ᵀ a[t]

Columns do not depend on one another. A tile of the state, (d, one or two vectors), stays in the first-level cache, and
one pass over its rows per step does all: it decays and updates a row, adds the row to the output, and adds it to the
product with the key of the next step, which that step begins with.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from subquad_numpy.codegen import aligned, inline, load, pointer, prefetch, shifted, spread, store, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_part, store_part
from subquad_numpy.delta_scan.layout import (
    CHANNELS,
    CHANNELS_NEAR,
    HEAD,
    HEAD_FAR,
    HEAD_NEAR,
    NONE,
    decayed,
    load_gate,
    load_gates,
)
from subquad_numpy.runtime.arguments import fields

FORWARD_RECORD = fields(HEAD, dict.fromkeys(("o", "state"), 0))
STEPS_AHEAD = 2  # the rows that are prefetched are so many steps of time ahead


@cache
def forward_kernel(dtype: str, gate: str, general: bool, vectors: int) -> Any:
    """Compile `forward(first, last, records)`; `gate` is "none", "head" or "channel", a tile has 1 or 2 vectors."""
    lanes, kind, zero = element(dtype)
    width, two = vectors * lanes, vectors == 2
    by_head, by_channel = gate == "head", gate == "channel"
    zero8 = np.uint8(0)
    form = "general" if general else "delta"

    @compiled(f"delta scan {dtype} {gate} {form} {vectors}", FORWARD_RECORD)
    def forward(first: int, last: int, records: Any) -> int:
        f = carray(records, 1)[0]
        n, heads, d, d_v, reverse = f.n, f.heads, f.d, f.d_v, f.reverse
        q, k, v, g = pointer(f.q, zero), pointer(f.k, zero), pointer(f.v, zero), pointer(f.g, zero)
        beta, a, b = pointer(f.beta, zero), pointer(f.a, zero), pointer(f.b, zero)
        initial_state, resets = pointer(f.initial_state, zero), pointer(f.resets, zero8)
        o, state, numbers = pointer(f.o, zero), pointer(f.state, zero), pointer(f.numbers, zero)
        has_resets = f.resets != 0
        scale = numbers[0]

        tiles = -(-d_v // width)
        size = -(-d // lanes) * lanes
        buffer = np.empty(d * width + 6 * size + 2 * lanes, kind)
        edge = aligned(buffer)
        S = shifted(edge, lanes)
        gates = shifted(S, d * width)  # factors, keeps and w ∘ k of a step
        gates_next = shifted(gates, 3 * size)

        for task in range(first, last):
            item, head, c0 = task // (tiles * heads), task // tiles % heads, task % tiles * width
            count = d_v - c0
            base = item * n * heads + head  # the row of time 0
            row = base + ((n - 1) * heads if reverse else 0)
            forth = -heads if reverse else heads  # rows from a step to the next
            for i in range(d):
                place = ((item * heads + head) * d + i) * d_v + c0
                if f.initial_state == 0:
                    store(S, i * width, zeros(edge))
                    if two:
                        store(S, i * width + lanes, zeros(edge))
                else:
                    store(S, i * width, load_part(initial_state, place, count, lanes, edge))
                    if two:
                        store(S, i * width + lanes, load_part(initial_state, place + lanes, count - lanes, lanes, edge))

            near = False
            if by_channel:
                near = load_gates(g, row * d, k, row * d, d, lanes, gates, edge)
            now = shifted(a, row * d) if general else shifted(k, row * d)
            if by_channel and not general:
                now = shifted(gates, 2 * size)
            u0, u1 = zeros(edge), zeros(edge)
            for i in range(d):
                u0 = spread(now, i) * load(S, i * width) + u0
                if two:
                    u1 = spread(now, i) * load(S, i * width + lanes) + u1

            for t in range(n):
                if has_resets and resets[item * n + (n - 1 - t if reverse else t)] != 0:
                    clear(S, d * width)
                    u0, u1 = zeros(edge), zeros(edge)
                following = row + forth if t < n - 1 else row
                ahead = row + STEPS_AHEAD * forth
                prefetch(v, ahead * d_v + c0)
                prefetch(o, ahead * d_v + c0)
                for i in range(0, d, lanes):
                    prefetch(q, ahead * d + i)
                    prefetch(k, ahead * d + i)
                near_next = False
                if by_channel:
                    near_next = load_gates(g, following * d, k, following * d, d, lanes, gates_next, edge)
                after = shifted(a, following * d) if general else shifted(k, following * d)
                if by_channel and not general:
                    after = shifted(gates_next, 2 * size)

                x0, x1 = load_part(v, row * d_v + c0, count, lanes, edge), zeros(edge)
                if two:
                    x1 = load_part(v, row * d_v + c0 + lanes, count - lanes, lanes, edge)
                factor = zeros(edge)
                if by_head:
                    factor, w, near = load_gate(g, row)
                    if not general:
                        u0, u1 = w * u0, w * u1
                if not general:
                    strength = spread(beta, row)
                    x0, x1 = strength * (x0 - u0), strength * (x1 - u1)
                rows = shifted(q, row * d), shifted(k, row * d), shifted(b, row * d), after
                given = u0, u1, x0, x1
                if by_channel:
                    if near:
                        o0, o1, u0, u1 = _pass(
                            CHANNELS_NEAR, general, two, S, d, size, lanes, width, factor, gates, rows, given
                        )
                    else:
                        o0, o1, u0, u1 = _pass(
                            CHANNELS, general, two, S, d, size, lanes, width, factor, gates, rows, given
                        )
                elif by_head:
                    if near:
                        o0, o1, u0, u1 = _pass(
                            HEAD_NEAR, general, two, S, d, size, lanes, width, factor, gates, rows, given
                        )
                    else:
                        o0, o1, u0, u1 = _pass(
                            HEAD_FAR, general, two, S, d, size, lanes, width, factor, gates, rows, given
                        )
                else:
                    o0, o1, u0, u1 = _pass(NONE, general, two, S, d, size, lanes, width, factor, gates, rows, given)
                store_part(o, row * d_v + c0, o0 * scale, count, lanes, edge)
                if two and count > lanes:
                    store_part(o, row * d_v + c0 + lanes, o1 * scale, count - lanes, lanes, edge)
                gates, gates_next, near = gates_next, gates, near_next
                row = following

            for i in range(d):
                place = ((item * heads + head) * d + i) * d_v + c0
                store_part(state, place, load(S, i * width), count, lanes, edge)
                if two and count > lanes:
                    store_part(state, place + lanes, load(S, i * width + lanes), count - lanes, lanes, edge)
        buffer[0] = 0  # see `aligned`
        return DONE

    return forward


@inline
def _pass(
    mode: int, general: bool, two: bool, S: Any, d: int, size: int, lanes: int, width: int, factor: Any, gates: Any,
    rows: Any, given: Any,
) -> Any:  # fmt: skip
    """Advance the rows of a tile by one step: the output, and the product with the key of the next step."""
    q, k, b, after = rows
    u0, u1, x0, x1 = given
    o0, o1, n0, n1 = zeros(S), zeros(S), zeros(S), zeros(S)
    keep = factor
    for i in range(d):
        if mode >= CHANNELS_NEAR:
            factor, keep = spread(gates, i), spread(gates, size + i)
        key, query, next_key = spread(k, i), spread(q, i), spread(after, i)
        s0 = decayed(mode, load(S, i * width), factor, keep)
        if general:
            s0 = spread(b, i) * u0 + s0
        s0 = key * x0 + s0
        store(S, i * width, s0)
        o0 = query * s0 + o0
        n0 = next_key * s0 + n0
        if two:
            s1 = decayed(mode, load(S, i * width + lanes), factor, keep)
            if general:
                s1 = spread(b, i) * u1 + s1
            s1 = key * x1 + s1
            store(S, i * width + lanes, s1)
            o1 = query * s1 + o1
            n1 = next_key * s1 + n1
    return o0, o1, n0, n1
