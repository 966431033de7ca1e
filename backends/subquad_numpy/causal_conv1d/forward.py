"""The causal convolution: one pass over memory, rows of channels in vectors.

    y[t] = act(bias + Σ_k weight[k] x[t − k])

A task is a chunk of time of one batch item. The inputs of a step are found first, as addresses of whole rows: of x, of
the initial state, or of zeros. Rows of x in half precision are widened once, into as many rows of scratch memory as
some steps see. Every output is the same sum in the same order, wherever chunks begin.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.causal_conv1d.layout import HEAD, place, seeing_after, seen_before, sizes_of
from subquad_numpy.codegen import aligned, inline, load, pointer, shifted
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import load_part
from subquad_numpy.codegen.stored import number_at, store_stored, store_stored_part, stored_as, widen_rows
from subquad_numpy.codegen.vector_math import sigmoid
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.runtime.stored import AS_COMPUTED

FORWARD_RECORD = fields(HEAD, {"y": 0, "state": 0})
ROWS = 4  # steps whose sums are in registers at once: a tap is loaded once for all of them


@inline
def _activated(value: Any, silu: int) -> Any:
    return value * sigmoid(value) if silu else value


@inline
def _sum_of_one(rows: Any, own: int, width: int, weight: Any, bias: Any, d: int, at: int, zero: Any) -> Any:
    """The sum of the step whose inputs have their addresses in `rows` from `own` on, for the channels at `at`."""
    value = load(bias, at)
    for k in range(width):
        value = load(weight, k * d + at) * load(pointer(rows[own + k], zero), at) + value
    return value


@inline
def _part_of_one(
    rows: Any, own: int, width: int, weight: Any, bias: Any, d: int, at: int, lanes: int, edge: Any, zero: Any
) -> Any:
    """`_sum_of_one` for the last channels of a row, fewer than a vector."""
    count = d - at
    value = load_part(bias, at, count, lanes, edge)
    for k in range(width):
        tap = load_part(weight, k * d + at, count, lanes, edge)
        term = load_part(pointer(rows[own + k], zero), at, count, lanes, edge)
        value = tap * term + value
    return value


@cache
def forward_kernel(dtype: str) -> Any:
    """Compile `forward(first, last, records)` for a real `dtype`; there are batch * chunks of `block` steps tasks."""
    lanes, kind, zero = element(dtype)
    size, byte = np.dtype(dtype).itemsize, np.uint8(0)

    @compiled(f"causal conv {dtype}", FORWARD_RECORD)
    def forward(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, d, width, block, reverse, silu = sizes_of(f)
        given, resets = pointer(f.weight, zero), pointer(f.resets, byte)
        x, y, state = pointer(f.x, zero), pointer(f.y, zero), pointer(f.state, zero)
        has_resets, history = f.resets != 0, width - 1
        x_as, y_as = stored_as(f.stored, 0), stored_as(f.stored, 1)
        is_half, kept = x_as != AS_COMPUTED, ROWS + history  # steps of x that are kept in scratch memory
        buffer = np.zeros(d + 2 * lanes, kind)
        edge = aligned(buffer)
        zeros = shifted(edge, lanes)
        blank = buffer.ctypes.data + 2 * lanes * size  # the address of d zeros
        bias = zeros
        if f.bias != 0:
            bias = pointer(f.bias, zero)
        taps = np.empty(width * d + 2 * lanes, kind)
        weight = aligned(taps)  # row k for the input k steps before
        if width == 4:  # a loop that the compiler turns into vectors: it takes longer than the sums of one step
            for c in range(d):
                weight[c] = given[4 * c + 3]
                weight[d + c] = given[4 * c + 2]
                weight[2 * d + c] = given[4 * c + 1]
                weight[3 * d + c] = given[4 * c]
        else:
            for c in range(d):
                for k in range(width):
                    weight[k * d + c] = given[c * width + history - k]
        rows = np.empty(ROWS * width, np.int64)  # addresses of the inputs of `ROWS` steps
        widened = np.empty(kept * d if is_half else 1, kind)
        wide, whole = widened.ctypes.data, d // lanes * lanes
        chunks = -(-n // block)
        for task in range(first, last):
            item, start = task // chunks, task % chunks * block
            stop = min(n, start + block)
            for t in range(start, stop, ROWS):
                count = min(ROWS, stop - t)
                for s in range(max(t - history if t == start else t, 0), t + count if is_half else 0):
                    own = (item * n + place(s, n, reverse)) * d
                    widen_rows(x, x_as, own, 0, 1, d, lanes, pointer(wide + s % kept * d * size, zero), 0)
                for i in range(count):
                    seen = seen_before(resets, has_resets, item * n, t + i, n, history, reverse)
                    for k in range(width):
                        source = blank
                        if k <= seen:
                            if t + i >= k and is_half:
                                source = wide + (t + i - k) % kept * d * size
                            elif t + i >= k:
                                source = f.x + (item * n + place(t + i - k, n, reverse)) * d * size
                            elif f.initial_state != 0:
                                source = f.initial_state + (item * history + history + t + i - k) * d * size
                        rows[i * width + k] = source
                out = (item * n + place(t, n, reverse)) * d
                step = -d if reverse else d
                if count == ROWS:
                    for at in range(0, whole, lanes):
                        s0 = load(bias, at)
                        s1, s2, s3 = s0, s0, s0
                        for k in range(width):
                            tap = load(weight, k * d + at)
                            s0 = tap * load(pointer(rows[k], zero), at) + s0
                            s1 = tap * load(pointer(rows[width + k], zero), at) + s1
                            s2 = tap * load(pointer(rows[2 * width + k], zero), at) + s2
                            s3 = tap * load(pointer(rows[3 * width + k], zero), at) + s3
                        store_stored(y, y_as, out + at, _activated(s0, silu))
                        store_stored(y, y_as, out + step + at, _activated(s1, silu))
                        store_stored(y, y_as, out + 2 * step + at, _activated(s2, silu))
                        store_stored(y, y_as, out + 3 * step + at, _activated(s3, silu))
                else:
                    for i in range(count):
                        for at in range(0, whole, lanes):
                            value = _sum_of_one(rows, i * width, width, weight, bias, d, at, zero)
                            store_stored(y, y_as, out + i * step + at, _activated(value, silu))
                if whole < d:
                    for i in range(count):
                        value = _part_of_one(rows, i * width, width, weight, bias, d, whole, lanes, edge, zero)
                        value = _activated(value, silu)
                        store_stored_part(y, y_as, out + i * step + whole, value, d - whole, lanes, edge)
            if stop == n:
                for i in range(history):
                    t = n - history + i
                    seen = seeing_after(resets, has_resets, item * n, t, n, history, reverse) >= history - i
                    source, kind_of_row = blank, AS_COMPUTED
                    if seen and t >= 0:
                        source = f.x + (item * n + place(t, n, reverse)) * d * (2 if is_half else size)
                        kind_of_row = x_as
                    elif seen and f.initial_state != 0:
                        source = f.initial_state + (item * history + n + i) * d * size
                    row = pointer(source, zero)
                    for c in range(d):
                        state[(item * history + i) * d + c] = number_at(row, kind_of_row, c)
        taps[0], widened[0] = 0, 0
        return DONE

    return forward
