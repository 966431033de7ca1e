"""Linear scan and its gradient; a task is a block of channels of one batch item.

    h[t] = a[t] h[t-1] + b[t]
    G[t] = ∂h[t] + conj(a[t+1]) G[t+1],      ∂b = G,      ∂a[t] = G[t] conj(h[t-1])

Where `resets` (batch, n), bytes, is not 0, h[t-1] is 0, and no G[t] enters G[t-1].
The time is that of reading and writing memory. Real numbers are computed in vectors, complex numbers one by one.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from subquad_numpy.codegen import aligned, inline, load, pointer, prefetch, shifted, store
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row, load_part, store_part
from subquad_numpy.runtime.arguments import Fields, fields

_SIZES: Fields = dict.fromkeys(("n", "d", "block", "reverse"))
SCAN_RECORD = fields(_SIZES, dict.fromkeys(("a", "b", "initial_state", "resets", "h"), 0))
GRADIENT_RECORD = fields(
    _SIZES, dict.fromkeys(("a", "h", "initial_state", "resets", "grad_h", "grad_a", "grad_b", "grad_initial_state"), 0)
)
BYTE = np.uint8(0)  # of `resets`
ROWS_AHEAD = 8  # the rows that are prefetched are so many steps of time ahead


@inline
def _task(task: int, d: int, block: int) -> tuple[int, int, int]:
    """(batch item, first channel, number of channels) of a task."""
    blocks = -(-d // block)
    c0 = task % blocks * block
    return task // blocks, c0, min(block, d - c0)


@cache
def linear_scan_kernel(dtype: str) -> Any:
    """Compile `scan(first, last, records)` for a real or complex `dtype`."""
    is_complex = np.dtype(dtype).kind == "c"
    lanes, kind, zero = element(dtype)

    @compiled(f"linear scan {dtype}", SCAN_RECORD)
    def scan(first: int, last: int, records: Any) -> int:
        f = carray(records, 1)[0]
        n, d, block, reverse = f.n, f.d, f.block, f.reverse
        a, b = pointer(f.a, zero), pointer(f.b, zero)
        initial_state, h = pointer(f.initial_state, zero), pointer(f.h, zero)
        resets, has_resets = pointer(f.resets, BYTE), f.resets != 0
        ahead = -ROWS_AHEAD * d if reverse else ROWS_AHEAD * d
        buffer = np.empty(block + 2 * lanes, kind)
        edge = aligned(buffer)
        state = shifted(edge, lanes)  # h[t] of the channels of a task
        for task in range(first, last):
            item, c0, width = _task(task, d, block)
            for c in range(block):
                state[c] = 0
            if f.initial_state != 0:
                load_padded_row(initial_state, item * d + c0, width, lanes, state)
            for t in range(n):
                step = item * n + (n - 1 - t if reverse else t)
                row = step * d + c0
                if has_resets and resets[step] != 0:
                    clear(state, block)
                if is_complex:
                    for c in range(width):
                        state[c] = a[row + c] * state[c] + b[row + c]
                        h[row + c] = state[c]
                else:
                    for at in range(0, width, lanes):
                        prefetch(a, row + at + ahead)
                        prefetch(b, row + at + ahead)
                        rate = load_part(a, row + at, width - at, lanes, edge)
                        value = rate * load(state, at) + load_part(b, row + at, width - at, lanes, edge)
                        store(state, at, value)
                        store_part(h, row + at, value, width - at, lanes, edge)
        buffer[0] = 0  # see `aligned`
        return DONE

    return scan


@cache
def linear_scan_gradient_kernel(dtype: str) -> Any:
    """Compile `gradient(first, last, records)` for a real or complex `dtype`."""
    is_complex = np.dtype(dtype).kind == "c"
    lanes, kind, zero = element(dtype)

    @compiled(f"linear scan gradient {dtype}", GRADIENT_RECORD)
    def gradient(first: int, last: int, records: Any) -> int:
        f = carray(records, 1)[0]
        n, d, block, reverse = f.n, f.d, f.block, f.reverse
        a, h = pointer(f.a, zero), pointer(f.h, zero)
        initial_state, grad_h = pointer(f.initial_state, zero), pointer(f.grad_h, zero)
        resets, has_resets = pointer(f.resets, BYTE), f.resets != 0
        grad_a, grad_b = pointer(f.grad_a, zero), pointer(f.grad_b, zero)
        grad_initial_state = pointer(f.grad_initial_state, zero)
        back = d if reverse else -d  # elements from a row to the row of the step before
        ahead = ROWS_AHEAD * back
        buffer = np.empty(3 * block + 2 * lanes, kind)
        edge = aligned(buffer)
        carry = shifted(edge, lanes)  # conj(a[t+1]) G[t+1]
        start = shifted(carry, block)  # the state before the first step
        nothing = shifted(start, block)  # the state before a step with a reset
        clear(nothing, block)
        for task in range(first, last):
            item, c0, width = _task(task, d, block)
            for c in range(block):
                carry[c] = 0
                start[c] = 0
            if f.initial_state != 0:
                load_padded_row(initial_state, item * d + c0, width, lanes, start)
            for t in range(n - 1, -1, -1):
                step = item * n + (n - 1 - t if reverse else t)
                row = step * d + c0
                anew = has_resets and resets[step] != 0
                entering = nothing if anew else start
                if is_complex:
                    for c in range(width):
                        G = grad_h[row + c] + carry[c]
                        before = entering[c] if t == 0 or anew else h[row + back + c]
                        grad_b[row + c] = G
                        grad_a[row + c] = G * before.conjugate()
                        carry[c] = a[row + c].conjugate() * G
                else:
                    for at in range(0, width, lanes):
                        count = width - at
                        prefetch(a, row + at + ahead)
                        prefetch(h, row + at + ahead)
                        prefetch(grad_h, row + at + ahead)
                        G = load_part(grad_h, row + at, count, lanes, edge) + load(carry, at)
                        before = load(entering, at)
                        if t > 0 and not anew:
                            before = load_part(h, row + back + at, count, lanes, edge)
                        store_part(grad_b, row + at, G, count, lanes, edge)
                        store_part(grad_a, row + at, G * before, count, lanes, edge)
                        store(carry, at, load_part(a, row + at, count, lanes, edge) * G)
                if anew:  # no step before sees what comes after
                    clear(carry, block)
            for c in range(width):
                grad_initial_state[item * d + c0 + c] = carry[c]
        buffer[0] = 0  # see `aligned`
        return DONE

    return gradient
