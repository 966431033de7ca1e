"""Linear scan and its gradient; a task is a block of channels of one batch item.

    h[t] = a[t] h[t-1] + b[t]
    G[t] = ∂h[t] + conj(a[t+1]) G[t+1],      ∂b = G,      ∂a[t] = G[t] conj(h[t-1])

Where `resets` (batch, n), bytes, is not 0, h[t-1] is 0, and no G[t] enters G[t-1].
The time is that of reading and writing memory. Real numbers are computed in vectors, complex numbers one by one. Arrays
over time may have half precision, as `stored` says.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import aligned, inline, load, pointer, shifted, store
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, load_padded_row
from subquad_numpy.codegen.stored import load_stored_part, prefetch_stored, store_stored_part, stored_as
from subquad_numpy.runtime.arguments import Fields, fields
from subquad_numpy.runtime.stored import BFLOAT16, FLOAT16, STORED_BITS

_SIZES: Fields = dict.fromkeys(("n", "d", "block", "reverse", "stored"))
SCAN_RECORD = fields(_SIZES, dict.fromkeys(("a", "b", "initial_state", "resets", "h"), 0))
GRADIENT_RECORD = fields(
    _SIZES, dict.fromkeys(("a", "h", "initial_state", "resets", "grad_h", "grad_a", "grad_b", "grad_initial_state"), 0)
)
BYTE = np.uint8(0)  # of `resets`
ALL_FLOAT16, ALL_BFLOAT16 = (sum(kind << (STORED_BITS * i) for i in range(3)) for kind in (FLOAT16, BFLOAT16))
ROWS_AHEAD = 8  # the rows that are prefetched are so many steps of time ahead


@inline
def _task(task: int, d: int, block: int) -> tuple[int, int, int]:
    """(batch item, first channel, number of channels) of a task."""
    blocks = -(-d // block)
    c0 = task % blocks * block
    return task // blocks, c0, min(block, d - c0)


@inline
def _advance(
    a: Any, a_as: int, b: Any, b_as: int, h: Any, h_as: int, row: int, ahead: int, width: int, lanes: int, state: Any,
    edge: Any,
) -> None:  # fmt: skip
    """One step of `width` channels; how arrays are stored may be constant, and then is not asked for each vector."""
    for at in range(0, width, lanes):
        count = width - at
        prefetch_stored(a, a_as, row + at + ahead)
        prefetch_stored(b, b_as, row + at + ahead)
        rate = load_stored_part(a, a_as, row + at, count, lanes, edge)
        term = load_stored_part(b, b_as, row + at, count, lanes, edge)
        value = rate * load(state, at) + term  # behind both loads: fused, or not, for every way of storing alike
        store(state, at, value)
        store_stored_part(h, h_as, row + at, value, count, lanes, edge)


@cache
def linear_scan_kernel(dtype: str) -> Any:
    """Compile `scan(first, last, records)` for a real or complex `dtype`."""
    is_complex = np.dtype(dtype).kind == "c"
    lanes, kind, zero = element(dtype)

    @compiled(f"linear scan {dtype}", SCAN_RECORD)
    def scan(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, d, block, reverse = f.n, f.d, f.block, f.reverse
        a, b = pointer(f.a, zero), pointer(f.b, zero)
        initial_state, h = pointer(f.initial_state, zero), pointer(f.h, zero)
        resets, has_resets = pointer(f.resets, BYTE), f.resets != 0
        a_as, b_as, h_as = stored_as(f.stored, 0), stored_as(f.stored, 1), stored_as(f.stored, 2)
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
                elif f.stored == ALL_BFLOAT16:
                    _advance(a, BFLOAT16, b, BFLOAT16, h, BFLOAT16, row, ahead, width, lanes, state, edge)
                elif f.stored == ALL_FLOAT16:
                    _advance(a, FLOAT16, b, FLOAT16, h, FLOAT16, row, ahead, width, lanes, state, edge)
                else:
                    _advance(a, a_as, b, b_as, h, h_as, row, ahead, width, lanes, state, edge)
        return DONE

    return scan


@cache
def linear_scan_gradient_kernel(dtype: str) -> Any:
    """Compile `gradient(first, last, records)` for a real or complex `dtype`."""
    is_complex = np.dtype(dtype).kind == "c"
    lanes, kind, zero = element(dtype)

    @compiled(f"linear scan gradient {dtype}", GRADIENT_RECORD)
    def gradient(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, d, block, reverse = f.n, f.d, f.block, f.reverse
        a, h = pointer(f.a, zero), pointer(f.h, zero)
        initial_state, grad_h = pointer(f.initial_state, zero), pointer(f.grad_h, zero)
        resets, has_resets = pointer(f.resets, BYTE), f.resets != 0
        grad_a, grad_b = pointer(f.grad_a, zero), pointer(f.grad_b, zero)
        grad_initial_state = pointer(f.grad_initial_state, zero)
        a_as, h_as, by_as = stored_as(f.stored, 0), stored_as(f.stored, 1), stored_as(f.stored, 2)
        by_a_as, by_b_as = stored_as(f.stored, 3), stored_as(f.stored, 4)
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
                        prefetch_stored(a, a_as, row + at + ahead)
                        prefetch_stored(h, h_as, row + at + ahead)
                        prefetch_stored(grad_h, by_as, row + at + ahead)
                        G = load_stored_part(grad_h, by_as, row + at, count, lanes, edge) + load(carry, at)
                        before = load(entering, at)
                        if t > 0 and not anew:
                            before = load_stored_part(h, h_as, row + back + at, count, lanes, edge)
                        store_stored_part(grad_b, by_b_as, row + at, G, count, lanes, edge)
                        store_stored_part(grad_a, by_a_as, row + at, G * before, count, lanes, edge)
                        store(carry, at, load_stored_part(a, a_as, row + at, count, lanes, edge) * G)
                if anew:  # no step before sees what comes after
                    clear(carry, block)
            for c in range(width):
                grad_initial_state[item * d + c0 + c] = carry[c]
        return DONE

    return gradient
