"""The gradient of the fixed scan: states are computed again from checkpoints, one tile of time after the other.

Let g be the gradient of C · h + D u, and G[t] that of h[t]. Then

    G[t] = conj(C) g[t] + G[t+1] + conj(r) G[t+1],          ∂u[t] = D g[t] + Re(conj(B) · G[t])
    ∂r = Σ_t G[t] conj(h[t−1]),      ∂B = Σ_t G[t] u[t],      ∂C = Σ_t g[t] conj(h[t]),      ∂D = Σ_t g[t] u[t]

where the gradient by a complex number is ∂/∂Re + i ∂/∂Im of the real loss.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import cut, inline, load, pointer, room, shifted, store, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row
from subquad_numpy.codegen.stored import load_stored_part, store_stored_part, stored_as
from subquad_numpy.lti_scan.forward import next_complex, next_real
from subquad_numpy.lti_scan.layout import ANEW, HEAD, PADDED, load_parts, place, read_codes, sizes_of
from subquad_numpy.runtime.arguments import fields

# grad_rate, grad_B and grad_C (batch, d, d_state) and grad_D (batch, d) are of double precision
RESULTS = ("grad_u", "grad_initial_state", "grad_rate", "grad_B", "grad_C", "grad_D")
TILE = 64  # steps between two saved states: those of a tile stay in a first-level cache
BACKWARD_RECORD = fields(HEAD, dict.fromkeys(("grad_y", "grad_state", *RESULTS), 0))


@inline
def _add(sums: Any, at: int, value: Any, scratch: Any, lanes: int) -> None:
    """Add a vector to numbers of double precision."""
    store(scratch, 0, value)
    for lane in range(lanes):
        sums[at + lane] += scratch[lane]


@cache
def backward_kernel(dtype: str, is_complex: bool) -> Any:
    """Compile `backward(first, last, records)` for a real `dtype` of u; there are batch * blocks of channels tasks."""
    lanes, kind, zero = element(dtype)
    parts, byte, zero64 = 2 if is_complex else 1, np.uint8(0), np.float64(0)

    @compiled(f"lti scan gradient {'complex ' * is_complex}{dtype}", BACKWARD_RECORD)
    def backward(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, d, d_state, block, reverse = sizes_of(f)
        u, rate, B, C = pointer(f.u, zero), pointer(f.rate, zero), pointer(f.B, zero), pointer(f.C, zero)
        D, initial_state = pointer(f.D, zero), pointer(f.initial_state, zero)
        resets, mask = pointer(f.resets, byte), pointer(f.mask, byte)
        grad_y, grad_state = pointer(f.grad_y, zero), pointer(f.grad_state, zero)
        grad_u, grad_initial_state = pointer(f.grad_u, zero), pointer(f.grad_initial_state, zero)
        grad_rate, grad_B, grad_C = (
            pointer(f.grad_rate, zero64),
            pointer(f.grad_B, zero64),
            pointer(f.grad_C, zero64),
        )
        grad_D = pointer(f.grad_D, zero64)
        u_as, y_as, by_u_as = stored_as(f.stored, 0), stored_as(f.stored, 1), stored_as(f.stored, 2)
        # a task takes one vector of channels after the other
        matrix, rows, tiles = d_state * lanes, TILE * lanes, -(-n // TILE)
        sizes = (lanes, 2 * matrix, 2 * matrix, 2 * matrix, 2 * matrix, lanes, rows, rows, rows, 4 * rows)
        buffer = np.empty(room(sizes), kind)
        # of a matrix, imaginary parts follow the real ones; `states` holds those before and after each step of a tile
        edge, r, b, c, G, skip, xs, gs, ds, states = cut(buffer, sizes)
        saved = np.empty(tiles * parts * matrix + lanes, kind)  # the states before each tile
        sums = np.empty(6 * matrix + lanes, np.float64)  # ∂r, ∂B and ∂C, each in parts, then ∂D
        codes = np.empty(TILE, np.int64)
        blocks = -(-d // block)
        for task in range(first, last):
            item, c_block = task // blocks, task % blocks * block
            for c0 in range(c_block, min(d, c_block + block), lanes):
                width = min(lanes, d - c0)
                row_of_model, row_of_state = c0 * d_state * parts, (item * d + c0) * d_state * parts
                load_parts(rate, row_of_model, width, d_state, lanes, parts, 1.0, r, shifted(r, matrix))
                load_parts(B, row_of_model, width, d_state, lanes, parts, 1.0, b, shifted(b, matrix))
                load_parts(C, row_of_model, width, d_state, lanes, parts, float(parts), c, shifted(c, matrix))
                load_parts(grad_state, row_of_state, width, d_state, lanes, parts, 1.0, G, shifted(G, matrix))
                clear(skip, lanes)
                if f.D != 0:
                    load_padded_row(D, c0, width, lanes, skip)
                clear(saved, parts * matrix)
                clear(sums, 6 * matrix + lanes)
                if f.initial_state != 0:
                    initial = pointer(saved.ctypes.data, zero)
                    imag = shifted(initial, matrix)
                    load_parts(initial_state, row_of_state, width, d_state, lanes, parts, 1.0, initial, imag)

                # The first tiles − 1 sweeps go forward and save states; the others go back over all tiles.
                for sweep in range(2 * tiles - 1):
                    k = min(sweep, 2 * tiles - 2 - sweep)
                    start = k * TILE
                    count = min(TILE, n - start)
                    forward = sweep < tiles - 1
                    read_codes(f, resets, mask, item, start, count, codes)
                    for i in range(count):
                        row = (item * n + place(start + i, n, reverse)) * d + c0
                        x = load_stored_part(u, u_as, row, width, lanes, edge)
                        store(xs, i * lanes, x)
                        if not forward:
                            g = load_stored_part(grad_y, y_as, row, width, lanes, edge)
                            if codes[i] & PADDED:
                                g = zeros(edge)
                            store(gs, i * lanes, g)
                            store(ds, i * lanes, load(skip, 0) * g)
                            _add(sums, 6 * matrix, g * x, edge, lanes)
                    for s in range(d_state):
                        p = s * lanes
                        h, r0, b0 = load(saved, k * parts * matrix + p), load(r, p), load(b, p)
                        if is_complex:
                            h_i = load(saved, k * parts * matrix + matrix + p)
                            r_i, b_i = load(r, matrix + p), load(b, matrix + p)
                        for i in range(count):
                            if codes[i] & ANEW:
                                h = zeros(edge)
                                if is_complex:
                                    h_i = zeros(edge)
                            if codes[i] & PADDED:
                                continue
                            x = load(xs, i * lanes)
                            store(states, i * lanes, h)
                            if is_complex:
                                store(states, 2 * rows + i * lanes, h_i)
                                h, h_i = next_complex(h, h_i, r0, r_i, b0, b_i, x)
                                store(states, 3 * rows + i * lanes, h_i)
                            else:
                                h = next_real(h, r0, b0, x)
                            store(states, rows + i * lanes, h)
                        if forward:
                            store(saved, (k + 1) * parts * matrix + p, h)
                            if is_complex:
                                store(saved, (k + 1) * parts * matrix + matrix + p, h_i)
                            continue
                        to_r, to_b, to_c, c0_, by = zeros(edge), zeros(edge), zeros(edge), load(c, p), load(G, p)
                        if is_complex:
                            to_r_i, to_b_i, to_c_i = zeros(edge), zeros(edge), zeros(edge)
                            c_i, by_i = load(c, matrix + p), load(G, matrix + p)
                        for i in range(count - 1, -1, -1):
                            if not codes[i] & PADDED:
                                x, g = load(xs, i * lanes), load(gs, i * lanes)
                                old, new = load(states, i * lanes), load(states, rows + i * lanes)
                                by = by + g * c0_
                                to_c = to_c + g * new
                                to_b = to_b + by * x
                                if is_complex:
                                    old_i = load(states, 2 * rows + i * lanes)
                                    new_i = load(states, 3 * rows + i * lanes)
                                    by_i = by_i - g * c_i
                                    to_c_i = to_c_i - g * new_i
                                    to_b_i = to_b_i + by_i * x
                                    to_r = to_r + (by * old + by_i * old_i)
                                    to_r_i = to_r_i + (by_i * old - by * old_i)
                                    store(ds, i * lanes, load(ds, i * lanes) + (b0 * by + b_i * by_i))
                                    more, more_i = r0 * by + r_i * by_i, r0 * by_i - r_i * by
                                    by, by_i = by + more, by_i + more_i
                                else:
                                    to_r = to_r + by * old
                                    store(ds, i * lanes, load(ds, i * lanes) + b0 * by)
                                    by = by + r0 * by
                            if codes[i] & ANEW:
                                by = zeros(edge)
                                if is_complex:
                                    by_i = zeros(edge)
                        store(G, p, by)
                        _add(sums, p, to_r, edge, lanes)
                        _add(sums, 2 * matrix + p, to_b, edge, lanes)
                        _add(sums, 4 * matrix + p, to_c * float(parts), edge, lanes)
                        if is_complex:
                            store(G, matrix + p, by_i)
                            _add(sums, matrix + p, to_r_i, edge, lanes)
                            _add(sums, 3 * matrix + p, to_b_i, edge, lanes)
                            _add(sums, 5 * matrix + p, to_c_i * float(parts), edge, lanes)
                    if forward:
                        continue
                    for i in range(count):
                        row = (item * n + place(start + i, n, reverse)) * d + c0
                        store_stored_part(grad_u, by_u_as, row, load(ds, i * lanes), width, lanes, edge)

                for lane in range(width):
                    grad_D[item * d + c0 + lane] = sums[6 * matrix + lane]
                    for s in range(d_state):
                        for part in range(parts):
                            to = row_of_state + (lane * d_state + s) * parts + part
                            of = part * matrix + s * lanes + lane
                            grad_initial_state[to] = G[of]
                            grad_rate[to] = sums[of]
                            grad_B[to] = sums[2 * matrix + of]
                            grad_C[to] = sums[4 * matrix + of]
        return DONE

    return backward
