"""The gradient of the causal convolution, from the end of time; the sums are computed again.

    ∂s[t] = ∂y[t] act'(s[t]),             ∂x[t] = Σ_k weight[k] ∂s[t + k]
    ∂weight[k] = Σ_t ∂s[t] x[t − k],      ∂bias = Σ_t ∂s[t]

A task is a block of channels of one batch item. ∂s of a tile of time, and of the width − 1 steps after it, is in cache.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.causal_conv1d.layout import HEAD, place, seeing_after, seen_before, sizes_of
from subquad_numpy.codegen import cut, load, pointer, room, shifted, store, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row, load_part, store_part
from subquad_numpy.codegen.stored import load_stored_part, store_stored_part, stored_as
from subquad_numpy.codegen.vector_math import sigmoid
from subquad_numpy.runtime.arguments import fields

# grad_weight (batch, width, d) and grad_bias (batch, d) are of float64
BACKWARD_RECORD = fields(
    HEAD,
    dict.fromkeys(("grad_y", "grad_state", "grad_x", "grad_initial_state", "grad_weight", "grad_bias"), 0),
)
TILE = 32  # steps whose sums over time are of the arrays' own precision; across tiles they are added up in float64


@cache
def backward_kernel(dtype: str) -> Any:
    """Compile `backward(first, last, records)` for a real `dtype`; there are batch * blocks of channels tasks."""
    lanes, kind, zero = element(dtype)
    byte, zero64 = np.uint8(0), np.float64(0)

    @compiled(f"causal conv gradient {dtype}", BACKWARD_RECORD)
    def backward(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, d, width, block, reverse, silu = sizes_of(f)
        history = width - 1
        x_as, y_as, by_x_as = stored_as(f.stored, 0), stored_as(f.stored, 1), stored_as(f.stored, 2)
        x, weight, bias = pointer(f.x, zero), pointer(f.weight, zero), pointer(f.bias, zero)
        initial_state, resets = pointer(f.initial_state, zero), pointer(f.resets, byte)
        has_state, has_resets = f.initial_state != 0, f.resets != 0
        grad_y, grad_state = pointer(f.grad_y, zero), pointer(f.grad_state, zero)
        grad_x, grad_initial_state = pointer(f.grad_x, zero), pointer(f.grad_initial_state, zero)
        grad_weight, grad_bias = pointer(f.grad_weight, zero64), pointer(f.grad_bias, zero64)

        sizes = (lanes, width * block, block, (width + 1) * block, (TILE + history) * block)
        buffer = np.empty(room(sizes), kind)
        # taps and offsets of the block; sums over a tile, the last row that of the bias; ∂s
        edge, taps, offsets, sums, slopes = cut(buffer, sizes)
        whole_sums = np.empty((width + 1) * block, np.float64)
        blocks, tiles = -(-d // block), -(-n // TILE)
        for task in range(first, last):
            item, c0 = task // blocks, task % blocks * block
            count = min(block, d - c0)
            for k in range(width):
                for c in range(block):
                    taps[k * block + c] = 0
                load_padded_row(weight, k * d + c0, count, lanes, shifted(taps, k * block))
            clear(offsets, block)
            if f.bias != 0:
                load_padded_row(bias, c0, count, lanes, offsets)
            clear(slopes, (TILE + history) * block)
            clear(sums, (width + 1) * block)
            for i in range((width + 1) * block):
                whole_sums[i] = 0
            for tile in range(tiles - 1, -1, -1):
                start = tile * TILE
                length = min(TILE, n - start)
                for i in range(length):
                    t = start + i
                    row = (item * n + place(t, n, reverse)) * d + c0
                    seen = seen_before(resets, has_resets, item * n, t, n, history, reverse)
                    for at in range(0, count, lanes):
                        slope = load_stored_part(grad_y, y_as, row + at, count - at, lanes, edge)
                        if silu:
                            value = load(offsets, at)
                            for k in range(seen + 1):
                                if t >= k:
                                    source = (item * n + place(t - k, n, reverse)) * d + c0
                                    term = load_stored_part(x, x_as, source + at, count - at, lanes, edge)
                                    value = load(taps, k * block + at) * term + value
                                elif has_state:
                                    source = (item * history + history + t - k) * d + c0
                                    term = load_part(initial_state, source + at, count - at, lanes, edge)
                                    value = load(taps, k * block + at) * term + value
                            part = sigmoid(value)
                            slope = slope * (part * (value * sigmoid(-value) + 1.0))
                        store(slopes, i * block + at, slope)
                        store(sums, width * block + at, load(sums, width * block + at) + slope)
                        for k in range(seen + 1):
                            if t >= k:
                                source = (item * n + place(t - k, n, reverse)) * d + c0
                                term = load_stored_part(x, x_as, source + at, count - at, lanes, edge)
                                store(sums, k * block + at, load(sums, k * block + at) + slope * term)
                            elif has_state:
                                source = (item * history + history + t - k) * d + c0
                                term = load_part(initial_state, source + at, count - at, lanes, edge)
                                store(sums, k * block + at, load(sums, k * block + at) + slope * term)
                for i in range((width + 1) * block):
                    whole_sums[i] += sums[i]
                clear(sums, (width + 1) * block)
                # a step before the first is a row of the initial state
                for i in range(-history if tile == 0 else 0, length):
                    t = start + i
                    seeing = seeing_after(resets, has_resets, item * n, t, n, history, reverse)
                    in_state = t + history >= n and seeing == history
                    for at in range(0, count, lanes):
                        own = (item * history + history + t - n) * d + c0 + at
                        total = load_part(grad_state, own, count - at, lanes, edge) if in_state else zeros(edge)
                        for k in range(max(0, -i), seeing + 1):
                            total = load(taps, k * block + at) * load(slopes, (i + k) * block + at) + total
                        if t >= 0:
                            out = (item * n + place(t, n, reverse)) * d + c0 + at
                            store_stored_part(grad_x, by_x_as, out, total, count - at, lanes, edge)
                        else:
                            out = (item * history + history + t) * d + c0 + at
                            store_part(grad_initial_state, out, total, count - at, lanes, edge)
                for i in range(history - 1, -1, -1):  # ∂s of the steps after the next tile, which has `TILE` steps
                    for c in range(block):
                        slopes[(TILE + i) * block + c] = slopes[i * block + c]
            for c in range(count):
                for k in range(width):
                    grad_weight[(item * width + k) * d + c0 + c] = whole_sums[k * block + c]
                grad_bias[item * d + c0 + c] = whole_sums[width * block + c]
        return DONE

    return backward
