"""The scan of a fixed diagonal model: the recurrence itself, one state of a vector of channels after the other.

    h ← h + (r h + B u),      y = C · h + D u,      r = Ā − 1      (2 Re(C · h) for complex r)

A task is a block of channels of one batch item. For each tile of time the inputs and outputs of a vector of channels
are in cache, and two states with their numbers in registers: of the 10 operations for a complex state and step none
waits for memory. A step is the same operations in the same order whatever the tiles are.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import cut, inline, load, pointer, room, store, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row, store_joined, store_turned
from subquad_numpy.codegen.stored import load_stored_part, prefetch_stored, store_stored_part, stored_as
from subquad_numpy.lti_scan.layout import ANEW, HEAD, PADDED, TILE, load_parts, place, read_codes, sizes_of
from subquad_numpy.runtime.arguments import fields

FORWARD_RECORD = fields(HEAD, {"y": 0, "state": 0})


@inline
def next_real(h: Any, r: Any, b: Any, x: Any) -> Any:
    """The next state of a real model."""
    return h + (r * h + b * x)


@inline
def next_complex(h: Any, h_i: Any, r: Any, r_i: Any, b: Any, b_i: Any, x: Any) -> tuple[Any, Any]:
    """The next state of a complex model, real and imaginary part."""
    return h + (r * h + (b * x - r_i * h_i)), h_i + (r * h_i + (b_i * x + r_i * h))


@cache
def forward_kernel(dtype: str, is_complex: bool) -> Any:
    """Compile `forward(first, last, records)` for a real `dtype` of u; there are batch * blocks of channels tasks."""
    lanes, kind, zero = element(dtype)
    parts, byte = 2 if is_complex else 1, np.uint8(0)

    @compiled(f"lti scan {'complex ' * is_complex}{dtype}", FORWARD_RECORD)
    def forward(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, d, d_state, block, reverse = sizes_of(f)
        u, rate, B, C = pointer(f.u, zero), pointer(f.rate, zero), pointer(f.B, zero), pointer(f.C, zero)
        D, initial_state = pointer(f.D, zero), pointer(f.initial_state, zero)
        resets, mask = pointer(f.resets, byte), pointer(f.mask, byte)
        y, state = pointer(f.y, zero), pointer(f.state, zero)
        u_as, y_as = stored_as(f.stored, 0), stored_as(f.stored, 1)
        matrix, ahead = block * d_state, -TILE * d if reverse else TILE * d
        rows = TILE * lanes
        sizes = (lanes, matrix, matrix, matrix, matrix, matrix, matrix, matrix, matrix, block, rows, rows)
        buffer = np.empty(room(sizes), kind)
        edge, h, h_i, r, r_i, b, b_i, c, c_i, skip, xs, ys = cut(buffer, sizes)
        codes = np.empty(TILE, np.int64)
        blocks = -(-d // block)
        for task in range(first, last):
            item, c0 = task // blocks, task % blocks * block
            width = min(block, d - c0)
            row_of_model, row_of_state = c0 * d_state * parts, (item * d + c0) * d_state * parts
            load_parts(rate, row_of_model, width, d_state, lanes, parts, 1.0, r, r_i)
            load_parts(B, row_of_model, width, d_state, lanes, parts, 1.0, b, b_i)
            load_parts(C, row_of_model, width, d_state, lanes, parts, float(parts), c, c_i)
            clear(h, matrix)
            clear(h_i, matrix)
            if f.initial_state != 0:
                load_parts(initial_state, row_of_state, width, d_state, lanes, parts, 1.0, h, h_i)
            clear(skip, block)
            if f.D != 0:
                load_padded_row(D, c0, width, lanes, skip)
            for start in range(0, n, TILE):
                count = min(TILE, n - start)
                read_codes(f, resets, mask, item, start, count, codes)
                for at in range(0, width, lanes):
                    for i in range(count):
                        row = (item * n + place(start + i, n, reverse)) * d + c0 + at
                        prefetch_stored(u, u_as, row + ahead)
                        x = load_stored_part(u, u_as, row, width - at, lanes, edge)
                        store(xs, i * lanes, x)
                        store(ys, i * lanes, load(skip, at) * x)
                    for s in range(0, d_state - 1, 2):
                        p = at * d_state + s * lanes
                        q = p + lanes
                        h0, h1, r0, r1 = load(h, p), load(h, q), load(r, p), load(r, q)
                        b0, b1, c0_, c1 = load(b, p), load(b, q), load(c, p), load(c, q)
                        if is_complex:
                            g0, g1, v0, v1 = (
                                load(h_i, p),
                                load(h_i, q),
                                load(r_i, p),
                                load(r_i, q),
                            )
                            w0, w1, z0, z1 = (
                                load(b_i, p),
                                load(b_i, q),
                                load(c_i, p),
                                load(c_i, q),
                            )
                        for i in range(count):
                            code = codes[i]
                            if code & ANEW:
                                h0 = h1 = zeros(edge)
                                if is_complex:
                                    g0 = g1 = zeros(edge)
                            if code & PADDED:
                                continue
                            x = load(xs, i * lanes)
                            if is_complex:
                                h0, g0 = next_complex(h0, g0, r0, v0, b0, w0, x)
                                h1, g1 = next_complex(h1, g1, r1, v1, b1, w1, x)
                                out = load(ys, i * lanes) + c0_ * h0 - z0 * g0
                                out = out + c1 * h1 - z1 * g1
                            else:
                                h0, h1 = next_real(h0, r0, b0, x), next_real(h1, r1, b1, x)
                                out = load(ys, i * lanes) + c0_ * h0 + c1 * h1
                            store(ys, i * lanes, out)
                        store(h, p, h0)
                        store(h, q, h1)
                        if is_complex:
                            store(h_i, p, g0)
                            store(h_i, q, g1)
                    if d_state % 2:
                        p = at * d_state + (d_state - 1) * lanes
                        h0, r0, b0, c0_ = load(h, p), load(r, p), load(b, p), load(c, p)
                        if is_complex:
                            g0, v0 = load(h_i, p), load(r_i, p)
                            w0, z0 = load(b_i, p), load(c_i, p)
                        for i in range(count):
                            code = codes[i]
                            if code & ANEW:
                                h0 = zeros(edge)
                                if is_complex:
                                    g0 = zeros(edge)
                            if code & PADDED:
                                continue
                            x = load(xs, i * lanes)
                            if is_complex:
                                h0, g0 = next_complex(h0, g0, r0, v0, b0, w0, x)
                                store(ys, i * lanes, load(ys, i * lanes) + c0_ * h0 - z0 * g0)
                            else:
                                h0 = next_real(h0, r0, b0, x)
                                store(ys, i * lanes, load(ys, i * lanes) + c0_ * h0)
                        store(h, p, h0)
                        if is_complex:
                            store(h_i, p, g0)
                    for i in range(count):
                        row = (item * n + place(start + i, n, reverse)) * d + c0 + at
                        out = zeros(edge) if codes[i] & PADDED else load(ys, i * lanes)
                        store_stored_part(y, y_as, row, out, width - at, lanes, edge)
            if is_complex:
                store_joined(state, row_of_state, width, d_state, lanes, h, h_i)
            else:
                store_turned(state, row_of_state, width, d_state, lanes, h)
        return DONE

    return forward
