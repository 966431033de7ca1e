"""The gradient of attention through exponential features, fused like the product itself (see `_features`).

    forward:  φ_k[j] = exp(x[j] − shift),  S = Σ_j φ_k[j] v[j]ᵀ,  s = Σ_j φ_k[j],     x[j] = k[j] W − h |k[j]|²
              φ_q[i] = exp(y[i]),  D[i] = φ_q[i]ᵀ s,  out[i] = φ_q[i]ᵀ S / D[i],     y[i] = q[i] W + start

    queries:  G = g / D,  e = −(g · out) / D
              dy = φ_q ∘ (G Sᵀ + e sᵀ),  dS = Σ_i φ_q[i] G[i]ᵀ,  ds = Σ_i φ_q[i] e[i],  dq = dy Wᵀ
    keys:     dx = φ_k ∘ (v dSᵀ + ds),  dv = φ_k dS,  dk = dx Wᵀ − 2 h (Σ_m dx) k

with g the gradient by out. The shift cancels in out, so it counts as a constant. Both also give the gradient by the
directions, turned: Σ_i dy[i] q[i]ᵀ and Σ_j dx[j] k[j]ᵀ, (m, d). Sums over rows are those of one chunk of them.
"""

from functools import cache
from typing import Any

import numba
import numpy as np

from subquad_numpy._compile import DONE, compiled, fingerprint
from subquad_numpy._math import exp_negative
from subquad_numpy._product import TILE_ROWS, multiply, pack, panel_at
from subquad_numpy._simd import aligned, at_least, inline, lanes_of, largest, load, shifted, spread, store, total, zeros
from subquad_numpy._tile import clear, field, load_part, row_in, store_part

ROWS = 8 * TILE_ROWS  # of a block

QUERY_FRAME = (
    # a task is `chunk` of n rows of an item; out_rows the features of all items: those of one chunk's sums
    *("n", "d", "m", "d_v", "chunks", "chunk", "out_rows"),
    # elements from row to row, of W also from column to column
    *("q_row", "W_row", "W_step", "kv_row", "out_row", "grad_row"),
    # addresses; start, k_sum: (…, m), or 0 for zeros and ones; numbers are (factor of W,); center: (…, d), or 0
    *("q", "W", "start", "kv", "k_sum", "out", "grad", "numbers", "center"),
    # table of int64: a row (q, W, start, kv, k_sum, out, grad, center) for each item: elements to its first
    "table",
    # (items, n, d); (chunks, out_rows, d_v), (chunks, out_rows), (chunks, out_rows, d) or 0
    *("grad_q", "grad_kv", "grad_sum", "grad_W"),
)
KEY_FRAME = (
    *("n", "d", "m", "d_v", "chunks", "chunk", "out_rows"),
    *("k_row", "v_row", "W_row", "W_step"),
    # mask is of bytes, or 0; numbers are (h, factor of W)
    *("k", "v", "W", "mask", "numbers", "center"),
    # table: a row (k, v, W, mask, center) for each item
    "table",
    # (items, m), (items, m, d_v), (items, m): what the forward pass left, and the sums over queries
    *("shift", "grad_kv", "grad_sum"),
    # (items, n, d), (items, n, d_v), (chunks, out_rows, d) or 0
    *("grad_k", "grad_v", "grad_W"),
)


@inline
def into_panels(panels: Any, row: int, column: int, width: int, value: Any, lanes: int) -> None:
    """Store a vector of one row of a block where a product with the block's rows as depth reads it."""
    first, columns = panel_at(column, width, lanes)
    store(panels, first * ROWS + row * columns + column - first, value)


@inline
def add_product(
    a: Any, a_row: int, height: int, panels: Any, depth: int, width: int, lanes: int, nothing: Any, part: Any, c: Any
) -> None:  # fmt: skip
    """C += Aᵀ B over the rows of a block; the block's own sum comes first, which keeps a float32 sum of many exact."""
    multiply(a, 1, a_row, height, panels, ROWS, depth, width, lanes, nothing, 0, part, width)
    for i in range(0, height * width, lanes):
        store(c, i, load(c, i) + load(part, i))


@inline
def rows_out(target: Any, place: int, rows: int, columns: int, source: Any, width: int, lanes: int, edge: Any) -> None:
    """Copy rows of scratch memory into a contiguous array."""
    for r in range(rows):
        for j in range(0, columns, lanes):
            store_part(target, place + r * columns + j, load(source, r * width + j), columns - j, lanes, edge)


@cache
def query_gradient_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile `differentiate(first, last, frame)` for queries; the chunk varies fastest."""
    lanes = lanes_of(dtype)
    kind = numba.from_dtype(dtype)
    zero, one, lowest = dtype.type(0), dtype.type(1), dtype.type(-np.inf)
    stamp = fingerprint()

    @compiled(f"gradient by queries {dtype}")
    def differentiate(first: int, last: int, frame: Any) -> int:
        stamp  # noqa: B018  part of the key of the cache on disk
        n, d, m, d_v, chunks, chunk, out_rows = frame[0], frame[1], frame[2], frame[3], frame[4], frame[5], frame[6]
        q_row, W_row, W_step, kv_row, out_row, grad_row = frame[7], frame[8], frame[9], frame[10], frame[11], frame[12]
        all_q, all_W, starts = field(frame, 13, zero), field(frame, 14, zero), field(frame, 15, zero)
        all_kv, sums, outs = field(frame, 16, zero), field(frame, 17, zero), field(frame, 18, zero)
        grads, numbers, centers = field(frame, 19, zero), field(frame, 20, zero), field(frame, 21, zero)
        has_start, has_sum, has_center = frame[15] != 0, frame[17] != 0, frame[21] != 0
        table = field(frame, 22, np.int64(0))
        grad_q, grad_kv, grad_sum = field(frame, 23, zero), field(frame, 24, zero), field(frame, 25, zero)
        has_W, grad_W = frame[26] != 0, field(frame, 26, zero)

        width = -(-m // lanes) * lanes
        height = -(-width // TILE_ROWS) * TILE_ROWS
        stride = -(-height // lanes) * lanes  # of exponents, which are also read as the rows of whole tiles
        d_in, d_out, depth = -(-d // lanes) * lanes, -(-d_v // lanes) * lanes, d_v + 1
        widest = max(d_in, d_out)
        size = ROWS * (2 * stride + 2 * d_in + d_out + d + depth) + (d + depth) * width + m * d_in
        size += stride * (d_in + d_out + widest) + 3 * stride + max(stride, widest) + d_in
        buffer = np.empty(size + 2 * lanes, kind)
        edge = aligned(buffer)
        start = shifted(edge, lanes)
        k_sum = shifted(start, stride)
        by_sum = shifted(k_sum, stride)
        nothing = shifted(by_sum, stride)
        center = shifted(nothing, max(stride, widest))
        packed = shifted(center, d_in)
        turned = shifted(packed, d * width)
        turned_kv = shifted(turned, m * d_in)
        by_kv = shifted(turned_kv, depth * width)
        by_W = shifted(by_kv, stride * d_out)
        part = shifted(by_W, stride * d_in)
        exponents = shifted(part, stride * widest)
        by_phi = shifted(exponents, ROWS * stride)
        result = shifted(by_phi, ROWS * stride)
        panels = shifted(result, ROWS * d_in)
        weighted = shifted(panels, ROWS * d_in)
        rows = shifted(weighted, ROWS * d_out)
        weights = shifted(rows, ROWS * d)
        clear(nothing, max(stride, widest))
        clear(center, d_in)
        clear(exponents, 2 * ROWS * stride)

        packed_for = -1
        for task in range(first, last):
            item = task // chunks
            entry = item * 8
            q, out, grad = (
                shifted(all_q, table[entry]), shifted(outs, table[entry + 5]), shifted(grads, table[entry + 6])
            )  # fmt: skip
            if packed_for != item:
                packed_for = item
                if has_center:
                    row_in(centers, table[entry + 7], d, lanes, center)
                W, kv = shifted(all_W, table[entry + 1]), shifted(all_kv, table[entry + 3])
                pack(W, W_row, W_step, d, m, numbers[0], lanes, packed, d)
                pack(W, W_step, W_row, m, d, numbers[0], lanes, turned, m)
                pack(kv, 1, kv_row, d_v, m, 1, lanes, turned_kv, depth)
                for i in range(width):
                    start[i] = lowest
                    k_sum[i] = 0
                    if i < m:
                        start[i] = starts[table[entry + 2] + i] if has_start else 0
                        k_sum[i] = sums[table[entry + 4] + i] if has_sum else 1
                    before, columns = panel_at(i, width, lanes)
                    turned_kv[before * depth + d_v * columns + i - before] = k_sum[i]
            clear(by_kv, stride * d_out)
            clear(by_W, stride * d_in)
            clear(by_sum, stride)

            stop = min(n, (task % chunks + 1) * chunk)
            for row in range(task % chunks * chunk, stop, ROWS):
                count = min(ROWS, stop - row)
                whole = -(-count // TILE_ROWS) * TILE_ROWS
                for r in range(count):
                    for p in range(0, d, lanes):
                        x = load_part(q, (row + r) * q_row + p, d - p, lanes, edge) - load(center, p)
                        store_part(rows, r * d + p, x, d - p, lanes, edge)
                        if has_W:
                            into_panels(panels, r, p, d_in, x, lanes)
                for i in range(count * d, whole * d):
                    rows[i] = 0
                multiply(rows, d, 1, whole, packed, d, d, width, lanes, start, 0, exponents, stride)
                for r in range(count):
                    top = load(exponents, r * stride)
                    for i in range(lanes, width, lanes):
                        top = at_least(load(exponents, r * stride + i), top)
                    highest = largest(top)
                    if highest == lowest:  # the row sees nothing
                        highest = zero
                    seen = zeros(rows)
                    for i in range(0, width, lanes):
                        e = exp_negative(load(exponents, r * stride + i) - highest)
                        store(exponents, r * stride + i, e)
                        seen = seen + e * load(k_sum, i)
                    edge[0] = total(seen)
                    inverse = one / edge[0] if edge[0] != 0 else zero
                    along = zeros(rows)
                    for j in range(0, d_v, lanes):
                        g = load_part(grad, (row + r) * grad_row + j, d_v - j, lanes, edge) * inverse
                        along = along + g * load_part(out, (row + r) * out_row + j, d_v - j, lanes, edge)
                        into_panels(weighted, r, j, d_out, g, lanes)
                        store_part(weights, r * depth + j, g, d_v - j, lanes, edge)
                    weights[r * depth + d_v] = -total(along)
                for i in range(count * depth, whole * depth):
                    weights[i] = 0
                multiply(
                    weights, depth, 1, whole, turned_kv, depth, depth, width, lanes, nothing, 0, by_phi, stride
                )  # fmt: skip
                for r in range(count):
                    e = spread(weights, r * depth + d_v)
                    for i in range(0, width, lanes):
                        phi = load(exponents, r * stride + i)
                        store(by_sum, i, load(by_sum, i) + phi * e)
                        store(by_phi, r * stride + i, load(by_phi, r * stride + i) * phi)
                add_product(exponents, stride, height, weighted, count, d_out, lanes, nothing, part, by_kv)
                multiply(by_phi, stride, 1, whole, turned, m, m, d_in, lanes, nothing, 0, result, d_in)
                rows_out(grad_q, (item * n + row) * d, count, d, result, d_in, lanes, edge)
                if has_W:
                    add_product(by_phi, stride, height, panels, count, d_in, lanes, nothing, part, by_W)

            place = task % chunks * out_rows + item * m
            for i in range(m):
                grad_sum[place + i] = by_sum[i]
            rows_out(grad_kv, place * d_v, m, d_v, by_kv, d_out, lanes, edge)
            if has_W:
                rows_out(grad_W, place * d, m, d, by_W, d_in, lanes, edge)
        buffer[0] = 0  # see `aligned`
        return DONE

    return differentiate


@cache
def key_gradient_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile `differentiate(first, last, frame)` for keys; the chunk varies fastest."""
    lanes = lanes_of(dtype)
    kind = numba.from_dtype(dtype)
    zero = dtype.type(0)
    stamp = fingerprint()

    @compiled(f"gradient by keys {dtype}")
    def differentiate(first: int, last: int, frame: Any) -> int:
        stamp  # noqa: B018  part of the key of the cache on disk
        n, d, m, d_v, chunks, chunk, out_rows = frame[0], frame[1], frame[2], frame[3], frame[4], frame[5], frame[6]
        k_row, v_row, W_row, W_step = frame[7], frame[8], frame[9], frame[10]
        all_k, all_v, all_W = field(frame, 11, zero), field(frame, 12, zero), field(frame, 13, zero)
        has_mask, all_masks = frame[14] != 0, field(frame, 14, np.uint8(0))
        numbers, has_center, centers = field(frame, 15, zero), frame[16] != 0, field(frame, 16, zero)
        table = field(frame, 17, np.int64(0))
        shifts, all_kv, all_sums = field(frame, 18, zero), field(frame, 19, zero), field(frame, 20, zero)
        grad_k, grad_v = field(frame, 21, zero), field(frame, 22, zero)
        has_W, grad_W = frame[23] != 0, field(frame, 23, zero)
        half_scale = numbers[0]

        width = -(-m // lanes) * lanes
        height = -(-width // TILE_ROWS) * TILE_ROWS
        stride = -(-height // lanes) * lanes
        d_in, d_out, depth = -(-d // lanes) * lanes, -(-d_v // lanes) * lanes, d + 1
        widest = max(d_in, d_out)
        size = ROWS * (2 * stride + 2 * d_in + d_out + depth + d_v) + depth * width + m * (d_in + d_out) + d_v * width
        size += 2 * stride * d_in + 2 * stride + max(stride, widest) + d_in
        buffer = np.empty(size + 2 * lanes, kind)
        edge = aligned(buffer)
        shift = shifted(edge, lanes)
        by_sum = shifted(shift, stride)
        nothing = shifted(by_sum, stride)
        center = shifted(nothing, max(stride, widest))
        packed = shifted(center, d_in)
        turned = shifted(packed, depth * width)
        by_kv = shifted(turned, m * d_in)
        turned_kv = shifted(by_kv, m * d_out)
        by_W = shifted(turned_kv, d_v * width)
        part = shifted(by_W, stride * d_in)
        exponents = shifted(part, stride * d_in)
        by_phi = shifted(exponents, ROWS * stride)
        by_k = shifted(by_phi, ROWS * stride)
        by_v = shifted(by_k, ROWS * d_in)
        panels = shifted(by_v, ROWS * d_out)
        rows = shifted(panels, ROWS * d_in)
        values = shifted(rows, ROWS * depth)
        places = np.empty(ROWS, np.int64)
        clear(nothing, max(stride, widest))
        clear(center, d_in)
        clear(exponents, 2 * ROWS * stride)

        packed_for = -1
        for task in range(first, last):
            item = task // chunks
            entry = item * 5
            k, v = shifted(all_k, table[entry]), shifted(all_v, table[entry + 1])
            mask = shifted(all_masks, table[entry + 3])
            if packed_for != item:
                packed_for = item
                if has_center:
                    row_in(centers, table[entry + 4], d, lanes, center)
                W, kv = shifted(all_W, table[entry + 2]), shifted(all_kv, item * m * d_v)
                pack(W, W_row, W_step, d, m, numbers[1], lanes, packed, depth)
                pack(W, W_step, W_row, m, d, numbers[1], lanes, turned, m)
                pack(kv, d_v, 1, m, d_v, 1, lanes, by_kv, m)
                pack(kv, 1, d_v, d_v, m, 1, lanes, turned_kv, d_v)
                row_in(shifts, item * m, m, lanes, shift)
                row_in(all_sums, item * m, m, lanes, by_sum)
                for i in range(width):
                    before, columns = panel_at(i, width, lanes)
                    packed[before * depth + d * columns + i - before] = 1
            clear(by_W, stride * d_in)

            row = task % chunks * chunk
            stop = min(n, row + chunk)
            while row < stop:
                count = 0
                while row < stop and count < ROWS:
                    if not has_mask or mask[row] != 0:
                        square = zeros(rows)
                        for p in range(0, d, lanes):
                            x = load_part(k, row * k_row + p, d - p, lanes, edge) - load(center, p)
                            square = square + x * x
                            store(by_k, count * d_in + p, x)
                            store_part(rows, count * depth + p, x, d - p, lanes, edge)
                            if has_W:
                                into_panels(panels, count, p, d_in, x, lanes)
                        # |k|² overflows long before k itself, and 0 · ∞ is NaN
                        rows[count * depth + d] = -half_scale * total(square) if half_scale != 0 else 0
                        for j in range(0, d_v, lanes):
                            y = load_part(v, row * v_row + j, d_v - j, lanes, edge)
                            store_part(values, count * d_v + j, y, d_v - j, lanes, edge)
                        places[count] = item * n + row
                        count += 1
                    else:
                        for p in range(d):
                            grad_k[(item * n + row) * d + p] = 0
                        for j in range(d_v):
                            grad_v[(item * n + row) * d_v + j] = 0
                    row += 1
                if count == 0:
                    break
                whole = -(-count // TILE_ROWS) * TILE_ROWS
                for i in range(count * depth, whole * depth):
                    rows[i] = 0
                for i in range(count * d_v, whole * d_v):
                    values[i] = 0
                multiply(
                    rows, depth, 1, whole, packed, depth, depth, width, lanes, nothing, 0, exponents, stride
                )  # fmt: skip
                multiply(values, d_v, 1, whole, turned_kv, d_v, d_v, width, lanes, by_sum, 0, by_phi, stride)
                for r in range(count):
                    sum_phi = zeros(rows)
                    for i in range(0, width, lanes):
                        phi = exp_negative(load(exponents, r * stride + i) - load(shift, i))
                        change = load(by_phi, r * stride + i) * phi
                        store(exponents, r * stride + i, phi)
                        store(by_phi, r * stride + i, change)
                        sum_phi = sum_phi + change
                    edge[0] = -2 * half_scale * total(sum_phi)
                    norm = spread(edge, 0)
                    for p in range(0, d, lanes):
                        store(by_k, r * d_in + p, load(by_k, r * d_in + p) * norm)
                multiply(exponents, stride, 1, whole, by_kv, m, m, d_out, lanes, nothing, 0, by_v, d_out)
                multiply(by_phi, stride, 1, whole, turned, m, m, d_in, lanes, by_k, d_in, by_k, d_in)
                for r in range(count):
                    rows_out(grad_k, places[r] * d, 1, d, shifted(by_k, r * d_in), d_in, lanes, edge)
                    rows_out(grad_v, places[r] * d_v, 1, d_v, shifted(by_v, r * d_out), d_out, lanes, edge)
                if has_W:
                    add_product(by_phi, stride, height, panels, count, d_in, lanes, nothing, part, by_W)

            if has_W:
                rows_out(grad_W, (task % chunks * out_rows + item * m) * d, m, d, by_W, d_in, lanes, edge)
        buffer[0] = 0  # see `aligned`
        return DONE

    return differentiate
