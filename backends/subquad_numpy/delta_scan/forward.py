"""The scan of the delta rule; a task is some tiles of columns (channels of values) of one head of one batch item."""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import cut, load, merged, pointer, room, shifted, store, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import load_part, store_part
from subquad_numpy.delta_scan.layout import BLOCK, HEAD, arrays_of, kinds_of, task_of
from subquad_numpy.delta_scan.walk import scratch_sizes, walk
from subquad_numpy.runtime.arguments import fields

FORWARD_RECORD = fields(HEAD, {"tiles": None}, dict.fromkeys(("o", "state"), 0))
"""The argument record; `tiles` is how many a task has."""
GATES = ("none", "head", "channel")


@cache
def forward_kernel(dtype: str, gate: str, general: bool) -> Any:
    """Compile `forward(first, last, records)`; `gate` is one of `GATES`."""
    lanes, kind, zero = element(dtype)
    which, width = GATES.index(gate), 2 * lanes
    form = "general" if general else "delta"

    @compiled(f"delta scan {dtype} {gate} {form}", FORWARD_RECORD)
    def forward(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, heads, d, d_v, reverse = f.n, f.heads, f.d, f.d_v, f.reverse
        x = arrays_of(f, zero)
        initial_state, has_state, has_resets = pointer(f.initial_state, zero), f.initial_state != 0, f.resets != 0
        o, state, numbers = pointer(f.o, zero), pointer(f.state, zero), pointer(f.numbers, zero)

        parts = -(-d_v // (f.tiles * width))
        sizes = lanes, f.tiles * d * width, *scratch_sizes(which, general, f.tiles, d, lanes, f.stored)
        buffer, modes = np.empty(room(sizes), kind), np.empty(room((BLOCK + 1,)), np.int64)
        edge, S, products, decays, wide_k, wide_q, wide_a, wide_b = cut(buffer, sizes)
        (mode,) = cut(modes, (BLOCK + 1,))
        scratch = products, decays, wide_k, wide_q, wide_a, wide_b, mode

        for number in range(first, last):
            place, c0 = number // parts, number % parts * f.tiles * width
            item, head, tiles = place // heads, place % heads, min(f.tiles, -(-(d_v - c0) // width))
            index = place * d * d_v + c0
            for i in range(tiles):
                c, tile = i * width, shifted(S, i * d * width)
                load_tile(initial_state, has_state, index + c, d, d_v, d_v - c0 - c, lanes, tile, edge)
            task = task_of(item, head, n, heads, reverse)
            walk(
                which, general, True, x, kinds_of(f.stored), has_resets, task, 0, n, n, d, d_v, c0, tiles, lanes, S, S,
                0, o, numbers[0], S, 0, scratch, edge,
            )  # fmt: skip
            for i in range(tiles):
                c, tile = i * width, shifted(S, i * d * width)
                store_tile(state, index + c, d, d_v, d_v - c0 - c, lanes, tile, edge)
        modes[0] = 0
        return DONE

    return forward


@merged
def load_tile(
    state: Any, given: bool, index: int, d: int, d_v: int, count: int, lanes: int, tile: Any, edge: Any
) -> None:
    """Copy `count` columns of a state, at most two vectors, into a tile; zeros if no state is given."""
    width = 2 * lanes
    for i in range(d):
        place = index + i * d_v
        store(tile, i * width, load_part(state, place, count, lanes, edge) if given else zeros(edge))
        behind = load_part(state, place + lanes, count - lanes, lanes, edge) if given else zeros(edge)
        store(tile, i * width + lanes, behind)


@merged
def store_tile(state: Any, index: int, d: int, d_v: int, count: int, lanes: int, tile: Any, edge: Any) -> None:
    """Copy a tile into `count` columns of a state."""
    width = 2 * lanes
    for i in range(d):
        place = index + i * d_v
        store_part(state, place, load(tile, i * width), count, lanes, edge)
        if count > lanes:
            store_part(state, place + lanes, load(tile, i * width + lanes), count - lanes, lanes, edge)
