"""The gradient of causal attention through exponential features, fused: two walks over its blocks.

    p[i, j] = exp(y[i] − L[i]) · exp(x[j]),  over features,    dw[i, j] = g[i] · (v[j] − out[i]),    j ≤ i
    dy[i] = exp(y[i] − L[i]) ∘ Σ_{j ≤ i} dw[i, j] exp(x[j]),   dx[j] = exp(x[j]) ∘ Σ_{i ≥ j} dw[i, j] exp(y[i] − L[i])
    dq = dy Uᵀ,    dk = dx Wᵀ − 2 h (Σ_m dx) k,    dv[j] = Σ_{i ≥ j} p[i, j] g[i]

L is the log of a row's sum of weights, g is the gradient by out; linear attention is as in `phi`. The first walk goes
forward and carries the sums over earlier keys, S = Σ_j exp(x[j] − σ) [v[j], 1]ᵀ. The second walk goes back and carries
the sums over later queries, R = Σ_i exp(y[i] − L[i] + σ) [g[i], −g[i] · out[i]]ᵀ, which begin with the gradients by the
sums of the state after. Here σ is the maximum of x up to the block, so that no exponent is above 0, as p ≤ 1. Pairs
within a block are formed as in `step`, relative to its ρ.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import (
    at_most,
    copy,
    cut,
    load,
    pointer,
    room,
    shifted,
    spread,
    store,
    where_negative,
    zeros,
)
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_part
from subquad_numpy.codegen.matmul import TILE_ROWS, Matrix, Panels, into_panels, multiply, padded, rows_at, turned
from subquad_numpy.codegen.turn import totals
from subquad_numpy.codegen.vector_math import LEAST, ZERO, exp_negative
from subquad_numpy.features.blocks import HEAD, OF_KEYS, SIDE, directions_of, store_rows, widths_of
from subquad_numpy.features.phi import ELU, MAPS, slope_of
from subquad_numpy.features.step import block_rows
from subquad_numpy.features.transposed import (
    Asked,
    Block,
    add_product,
    choose_reference,
    exponents,
    features,
    hide,
    lanes_to_rows,
    largest_exponents,
    load_directions,
    product,
    rows_to_lanes,
    through_directions,
)
from subquad_numpy.runtime.arguments import fields

# An item is one task. The fields q_* are the queries' `SIDE`, those without prefix are the keys'; centers are not read.
STEP_GRADIENT_RECORD = fields(
    HEAD,
    OF_KEYS,
    {f"q_{name}": axes for name, axes in SIDE.items()},
    # the state before, or address 0, and what `step` left for the gradient: see `STEP_RECORD`; then the gradient by out
    {"kv": 2, "k_sum": 2, "level": 1, "shifts": 2, "out_row": None, "out": 2, "grad_row": None, "grad": 2},
    # the shift of the state after, and the gradients by its sums, or address 0 for both
    {"new_shift": 2, "grad_new_kv": 2, "grad_new_sum": 2},
    # contiguous; grad_kv and grad_sum are by the state before
    {"grad_q": 2, "grad_k": 2, "grad_v": 2, "grad_kv": 2, "grad_sum": 2},
)


@cache
def step_gradient_kernel(dtype: np.dtype[Any], phi_name: str) -> Any:
    """Compile the gradient of the causal step; a task is one item."""
    lanes, kind, zero = element(dtype)
    phi = MAPS[phi_name].number
    block = block_rows(dtype)
    one, lowest = dtype.type(1), dtype.type(-np.inf)

    @compiled(f"gradient of step {dtype} {phi_name}", STEP_GRADIENT_RECORD)
    def differentiate(first: int, last: int, frames: Any) -> int:
        f = frames[0]
        n, d, m, d_v = f.n, f.d, f.m, f.d_v
        blocks = -(-n // block)
        depth, depth_v = d + 1, d_v + 1
        _, height, stride, _, d_out = widths_of(m, d, d_v, lanes)
        high, high_d, high_v = padded(block, TILE_ROWS), padded(depth, TILE_ROWS), padded(depth_v, TILE_ROWS)
        across = padded(high_v, lanes)  # stride of the rows of the carried state, each of d_v + 1 numbers
        sizes = (
            *(lanes, stride, stride, stride, stride, stride, max(stride, across, block)),
            *(block, block, block, block, block, 2 * block, 2 * block),
            *(stride * depth + TILE_ROWS, stride * depth + TILE_ROWS, stride * across, stride * d_out, block * d_out),
            *(high_d * block, high_d * block, high_v * block, high_v * block, max(high_d, high_v, stride) * block),
            *(stride * block, stride * block, stride * block, stride * block, stride * block, stride * block),
            *(stride * block, high * block, high * block),
        )
        # Vectors of the block's rows:
        #     top, level        largest exponent over ρ of each key, of each query
        #     bound, gap        L of each query (∞ from `count` on), and level − L
        #     zeroes            zeros, as a `top` that scales nothing
        #     later, earlier    0 and −∞, block times each: added from some place on, they hide later or earlier keys
        # Features: phi_k and phi_q are over ρ, phi_after is over σ. sums is the last column of the state.
        buffer = np.empty(room(sizes), kind)
        (
            edge, shift, after, reference, opposite, sums, nothing,
            top, level, gap, bound, zeroes, later, earlier,
            turned_k, turned_q, state, part, panels,
            keys, queries, values, grads, by_rows,
            x, y, phi_k, phi_q, phi_after, by_phi, other, pairs, weights,
        ) = cut(buffer, sizes)  # fmt: skip
        above_k, above_q = (keys, queries) if phi == ELU else (x, y)  # the y of which φ's value is a function
        clear(edge, room(sizes) - 2 * lanes)
        for j in range(2 * block):
            later[j] = 0 if j < block else lowest
            earlier[j] = lowest if j < block else 0

        space = Block(block, lanes, nothing, edge)
        state_rows, value_panels = rows_at(state, across), Panels(panels, block)
        part_rows, zero_row = rows_at(part, d_out), rows_at(nothing, 0)

        for item in range(first, last):
            f = frames[item]
            q, k, v = pointer(f.q_x, zero), pointer(f.x, zero), pointer(f.v, zero)
            out, grad = pointer(f.out, zero), pointer(f.grad, zero)
            q_row, k_row, v_row, out_row, g_row = f.q_x_row, f.x_row, f.v_row, f.out_row, f.grad_row
            mask, has_mask = pointer(f.mask, np.uint8(0)), f.mask != 0
            grad_q, grad_k, grad_v = pointer(f.grad_q, zero), pointer(f.grad_k, zero), pointer(f.grad_v, zero)
            shifts, levels = pointer(f.shifts, zero), pointer(f.level, zero)
            q_factor, k_factor = pointer(f.q_numbers, zero)[0], pointer(f.numbers, zero)[0]
            half_scale = pointer(f.numbers, zero)[1]
            if phi != ELU:
                U = Matrix(pointer(f.q_W, zero), f.q_W_row, f.q_W_column)
                load_directions(directions_of(f, zero), d, m, k_factor, turned_k)
                load_directions(U, d, m, q_factor, turned_q)
            ends, has_after = pointer(f.new_shift, zero), f.grad_new_kv != 0

            # steps 0 … blocks − 1 are the first walk, the others the second, with the blocks in reverse order
            for step in range(2 * blocks):
                back = step >= blocks
                at = 2 * blocks - 1 - step if back else step
                row, is_last = at * block, at == blocks - 1
                count = min(block, n - row)
                whole = padded(count, TILE_ROWS)
                if step == 0 or step == blocks:
                    clear(state, stride * across)
                    clear(sums, stride)
                    given, given_sum = (f.grad_new_kv, f.grad_new_sum) if back else (f.kv, f.k_sum)
                    if given != 0:
                        copy(pointer(given_sum, zero), m, sums)
                        for i in range(m):
                            copy(shifted(pointer(given, zero), i * d_v), d_v, shifted(state, i * across))
                            state[i * across + d_v] = sums[i]
                follows = not is_last or has_after
                known = ends if is_last else shifted(shifts, (at + 1) * m)
                for i in range(0, m, lanes):
                    store(shift, i, load_part(shifts, at * m + i, m - i, lanes, edge))
                    store(after, i, zeros(x) + lowest)  # −σ; not needed in the last block if nothing follows
                    if follows:
                        sigma = load_part(known, i, m - i, lanes, edge)
                        store(after, i, where_negative(sigma - LEAST(sigma), ZERO(sigma), -sigma))
                here = shifted(mask, row)
                rows_to_lanes(rows_at(shifted(q, row * q_row), q_row), count, d, here, False, queries, space)
                rows_to_lanes(rows_at(shifted(k, row * k_row), k_row), count, d, here, has_mask, keys, space)
                rows_to_lanes(rows_at(shifted(v, row * v_row), v_row), count, d_v, here, has_mask, values, space)
                rows_to_lanes(rows_at(shifted(grad, row * g_row), g_row), count, d_v, here, False, grads, space)
                for r in range(block):
                    along, bound[r] = zeros(x), -lowest
                    if r < count:
                        bound[r] = levels[row + r]
                        for j in range(0, d_v, lanes):
                            g = load_part(grad, (row + r) * g_row + j, d_v - j, lanes, edge)
                            along = along + g * load_part(out, (row + r) * out_row + j, d_v - j, lanes, edge)
                    store(pairs, r * lanes, along)
                for r in range(0, block, lanes):
                    store(values, d_v * block + r, zeros(x) + one)
                    store(grads, d_v * block + r, -totals(pairs, r * lanes))
                if half_scale != 0:
                    for j in range(0, block, lanes):
                        square = zeros(x)
                        for p in range(d):
                            square = square + load(keys, p * block + j) * load(keys, p * block + j)
                        store(keys, d * block + j, square * -half_scale)
                exponents(keys, turned_k, d, height, k_factor, phi, x, space)
                exponents(queries, turned_q, d, height, q_factor, phi, y, space)
                hide(x, keys, m, count, here, has_mask, phi, space)
                empty = choose_reference(shift, x, m, stride, space, reference, opposite)
                # meanwhile the rows of the next step are asked for; the second walk begins with those of the last
                then, there = row - block if back else row + block, 0
                if step != blocks - 1 and then >= 0:
                    there = min(block, n - then)
                next_q, next_k = (
                    Asked(shifted(q, then * q_row), q_row, there, d),
                    Asked(shifted(k, then * k_row), k_row, there, d),
                )
                largest_exponents(x, opposite, m, top, space, next_q)
                largest_exponents(y, reference, m, level, space, next_k)
                features(
                    x, above_k, opposite, top, m, phi, phi_k, space, Asked(shifted(v, then * v_row), v_row, there, d_v)
                )
                features(
                    y,
                    above_q,
                    reference,
                    level,
                    m,
                    phi,
                    phi_q,
                    space,
                    Asked(shifted(grad, then * g_row), g_row, there, d_v),
                )
                features(
                    x,
                    above_k,
                    after,
                    zeroes,
                    m,
                    phi,
                    phi_after,
                    space,
                    Asked(shifted(out, then * out_row), out_row, there, d_v),
                )
                for j in range(0, block, lanes):
                    store(gap, j, load(level, j) - load(bound, j))

                if not back:  # gradient by queries: from the state, then from pairs within the block
                    product(state_rows, height, grads, depth_v, by_phi, space)
                    for j in range(0, block, lanes):
                        distance = load(gap, j)
                        faded = exp_negative(at_most(distance, ZERO(distance)))
                        for i in range(0, m * block, block):
                            store(by_phi, i + j, zeros(x) if empty else load(by_phi, i + j) * faded)
                    product(turned(rows_at(values, block)), whole, grads, depth_v, pairs, space)
                    for r in range(count):
                        for j in range(0, block, lanes):
                            e = exp_negative(spread(top, r) + load(earlier, block - r + j) + load(gap, j))
                            store(pairs, r * block + j, load(pairs, r * block + j) * e)
                    add_product(rows_at(phi_k, block), height, pairs, count, by_phi, space)
                    for i in range(0, m * block, lanes):
                        store(by_phi, i, load(by_phi, i) * slope_of(load(phi_q, i), load(above_q, i), phi))
                    through_directions(by_phi, turned_q, d, m, q_factor, phi, by_rows, space)
                    lanes_to_rows(by_rows, count, d, shifted(grad_q, row * d), space)
                    if is_last:
                        continue
                else:
                    product(state_rows, height, values, depth_v, by_phi, space)
                    product(turned(state_rows), high_v, phi_after, m, by_rows, space)
                    product(turned(rows_at(phi_q, block)), whole, phi_k, m, weights, space)
                    product(turned(rows_at(grads, block)), whole, values, depth_v, pairs, space)
                    for r in range(count):
                        for j in range(0, block, lanes):
                            e = exp_negative(spread(gap, r) + load(later, block - 1 - r + j) + load(top, j))
                            store(weights, r * block + j, load(weights, r * block + j) * e)
                            store(pairs, r * block + j, load(pairs, r * block + j) * e)
                    add_product(rows_at(grads, block), high_v, weights, count, by_rows, space)
                    lanes_to_rows(by_rows, count, d_v, shifted(grad_v, row * d_v), space)
                    product(rows_at(phi_q, block), height, pairs, count, other, space)
                    for i in range(0, m * block, lanes):
                        far = load(by_phi, i) * slope_of(load(phi_after, i), load(above_k, i), phi)
                        near = load(other, i) * slope_of(load(phi_k, i), load(above_k, i), phi)
                        store(by_phi, i, near + far)
                    through_directions(by_phi, turned_k, d, m, k_factor, phi, by_rows, space)
                    if phi != ELU:
                        for j in range(0, block, lanes):
                            norm = load(by_rows, d * block + j) * (-2 * half_scale)
                            for p in range(0, d * block, block):
                                store(by_rows, p + j, load(by_rows, p + j) + norm * load(keys, p + j))
                    lanes_to_rows(by_rows, count, d, shifted(grad_k, row * d), space)
                    features(y, above_q, shift, bound, m, phi, other, space, Asked(q, 0, 0, 0))

                # add the sums over these keys to S, or over these queries to R; both fade as σ changes
                left, last_row = (other, grads) if back else (phi_after, values)
                rows, rows_step = (grad, g_row) if back else (v, v_row)
                for r in range(count):
                    hidden = not back and has_mask and here[r] == 0
                    for j in range(0, d_v, lanes):
                        value = zeros(x)
                        if not hidden:
                            value = load_part(rows, (row + r) * rows_step + j, d_v - j, lanes, edge)
                        into_panels(value_panels, r, j, d_out, value, lanes)
                multiply(rows_at(left, block), height, value_panels, count, d_out, lanes, zero_row, part_rows)
                for i in range(m):  # `by_phi` is free: lanes of as many features as a vector has join at once
                    along = zeros(x)
                    for j in range(0, block, lanes):
                        along = along + load(left, i * block + j) * load(last_row, d_v * block + j)
                    store(by_phi, i * lanes, along)
                for i in range(0, m, lanes):
                    fade = exp_negative(load(shift, i) + load(after, i))
                    store(shift, i, fade)
                    store(sums, i, load(sums, i) * fade + totals(by_phi, i * lanes))
                for i in range(m):
                    fade = spread(shift, i)
                    for j in range(0, d_out, lanes):
                        store(state, i * across + j, load(state, i * across + j) * fade + load(part, i * d_out + j))
                    state[i * across + d_v] = sums[i]

            copy(sums, m, pointer(f.grad_sum, zero))
            store_rows(pointer(f.grad_kv, zero), m, d_v, state_rows, lanes, edge)
        return DONE

    return differentiate
