"""One step of a Mamba block in four phases, between which threads wait for each other.

    1   u, z = in_proj x,  u ← silu(conv(u))                        tasks are blocks of outputs
    2   delta, B, C = x_proj u                                      blocks of outputs
    3   h ← exp(Δ A) h + Δ B u,  y = (C · h + D u) silu(z)          blocks of channels, Δ = softplus(dt_proj delta + bias)
    4   out = out_proj y                                            blocks of outputs

Every weight is read once. A thread takes tasks of a phase until none is left, then waits for those that others have
taken. Each *part*, a task of `runtime.threads`, goes through all phases: threads may come at any time, or never.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from subquad_numpy.codegen import add_where_zero, aligned, inline, load, pointer, shifted, store, total
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import load_part, store_part
from subquad_numpy.codegen.dots import STORED, products
from subquad_numpy.codegen.vector_math import LOG2_E, sigmoid, softplus, split_exp2
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.runtime.native_tasks import call, fetch_add

# `give_way` is the address of a function that yields to other threads, or 0
SIZES = ("batch", "d_model", "d_inner", "d_state", "dt_rank", "width", "give_way")
INPUTS = (
    "x", "in_proj", "in_bias", "taps", "taps_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D", "out_proj",
    "out_bias", "conv", "ssm",
)  # fmt: skip
# results, then scratch that threads share: numbers, and counters, zeros at first
OUTPUTS = ("out", "new_conv", "new_ssm", "work", "counters")
RECORD = fields(dict.fromkeys(SIZES), dict.fromkeys((*INPUTS, *OUTPUTS), 0))
BLOCK, SMALL_BLOCK = 32, 8  # outputs of a task: of the large matrices, of x_proj
PHASES, COUNTERS = 4, 8  # counters of int64: tasks taken and tasks finished of each phase
PATIENCE = 2000  # looks at a counter before yielding, some 20 µs


@inline
def _next(counters: Any, phase: int, finished: int) -> int:
    """The next task of a phase, after `finished` ones of this thread (0 or 1) are counted."""
    if finished:
        fetch_add(counters, 2 * phase + 1, 1)
    return fetch_add(counters, 2 * phase, 1)


@inline
def _wait(counters: Any, phase: int, tasks: int, give_way: int) -> None:
    """Return when all tasks of a phase are finished."""
    looks = 0
    while fetch_add(counters, 2 * phase + 1, 0) < tasks:
        looks += 1
        if looks > PATIENCE and give_way != 0:
            call(give_way, 0, 0, 0)


@inline
def _convolve(f: Any, both: Any, u: Any, start: int, stop: int, lanes: int, taps: Any, edge: Any, zero: Any) -> None:
    """u = silu(bias + Σ_k taps[k] input[k]) of a block of channels, and the inputs that the next step needs.

    `taps` is scratch for the taps of the block, those of one place in a row.
    """
    given, bias, conv, new_conv = (
        pointer(f.taps, zero), pointer(f.taps_bias, zero), pointer(f.conv, zero), pointer(f.new_conv, zero),
    )  # fmt: skip
    width, history, d = f.width, f.width - 1, f.d_inner
    for c in range(start, stop):
        for k in range(width):
            taps[k * BLOCK + c - start] = given[c * width + k]
    for item in range(f.batch):
        for c in range(start, stop, lanes):
            count, row = stop - c, item * history * d + c
            new = load_part(both, item * 2 * d + c, count, lanes, edge)
            s = load(taps, history * BLOCK + c - start) * new
            if f.taps_bias != 0:
                s = s + load_part(bias, c, count, lanes, edge)
            for k in range(history):
                before = load_part(conv, row + k * d, count, lanes, edge)
                s = load(taps, k * BLOCK + c - start) * before + s
                if k > 0:
                    store_part(new_conv, row + (k - 1) * d, before, count, lanes, edge)
            if history > 0:
                store_part(new_conv, row + (history - 1) * d, new, count, lanes, edge)
            store_part(u, item * d + c, s * sigmoid(s), count, lanes, edge)


@inline
def _advance(
    f: Any, both: Any, u: Any, delta: Any, low: Any, start: int, stop: int, lanes: int, edge: Any, zero: Any
) -> None:
    """The recurrence of a block of channels, whose states are vectors; y is written over u."""
    A_log, D, ssm, new_ssm = (
        pointer(f.A_log, zero), pointer(f.D, zero), pointer(f.ssm, zero), pointer(f.new_ssm, zero),
    )  # fmt: skip
    d, d_state, low_width = f.d_inner, f.d_state, f.dt_rank + 2 * f.d_state
    for item in range(f.batch):
        for c in range(start, stop, lanes):
            at = item * d + c
            store_part(delta, at, softplus(load_part(delta, at, stop - c, lanes, edge)), stop - c, lanes, edge)
    for c in range(start, stop):
        for s in range(0, d_state, lanes):
            count = d_state - s
            growth, whole = split_exp2(load_part(A_log, c * d_state + s, count, lanes, edge) * LOG2_E)
            rate = add_where_zero(whole, growth, growth * 0.0 + 1.0) * -LOG2_E  # A in powers of 2: A = −exp(A_log)
            for item in range(f.batch):
                step, x = delta[item * d + c], u[item * d + c]
                B = item * low_width + f.dt_rank + s
                at = (item * d + c) * d_state + s
                factor, whole = split_exp2(rate * step)
                h = load_part(ssm, at, count, lanes, edge)
                h = add_where_zero(whole, factor * h + load_part(low, B, count, lanes, edge) * (step * x), h)
                store_part(new_ssm, at, h, count, lanes, edge)
                part = total(h * load_part(low, B + d_state, count, lanes, edge))
                place = (f.batch + item) * d + c  # of the sum over states
                u[place] = part if s == 0 else u[place] + part
    for item in range(f.batch):
        for c in range(start, stop, lanes):
            at, gate_at, count = item * d + c, item * 2 * d + d + c, stop - c
            gate = load_part(both, gate_at, count, lanes, edge)
            skip = load_part(D, c, count, lanes, edge) * load_part(u, at, count, lanes, edge)
            y = load_part(u, at + f.batch * d, count, lanes, edge) + skip
            store_part(u, at, y * (gate * sigmoid(gate)), count, lanes, edge)


@cache
def step_kernel(dtype: str, stored: str) -> Any:
    """Compile `step(first, last, records)`, for numbers of a real `dtype` and matrices of the dtype `stored`."""
    lanes, kind, zero = element(dtype)
    weight, multiply, count_type = STORED[stored], products(stored), np.int64(0)

    @compiled(f"mamba step {dtype} by {stored}", RECORD)
    def step(first: int, last: int, records: Any) -> int:
        f = carray(records, 1)[0]
        batch, d_model, d_inner, low_width = f.batch, f.d_model, f.d_inner, f.dt_rank + 2 * f.d_state
        buffer = np.empty((f.width + 1) * BLOCK + 2 * lanes, kind)
        edge = aligned(buffer)
        taps = shifted(edge, lanes)
        both, counters = pointer(f.work, zero), pointer(f.counters, count_type)
        u = shifted(both, batch * 2 * d_inner)
        delta = shifted(u, 2 * batch * d_inner)  # between them, sums over states
        low = shifted(delta, batch * d_inner)
        x, out, nothing = pointer(f.x, zero), pointer(f.out, zero), pointer(0, zero)
        in_bias, dt_bias, out_bias = pointer(f.in_bias, zero), pointer(f.dt_bias, zero), pointer(f.out_bias, zero)
        blocks = -(-d_inner // BLOCK)  # of channels
        blocks_of_low, blocks_of_out = -(-low_width // SMALL_BLOCK), -(-d_model // BLOCK)
        for _ in range(first, last):
            task = _next(counters, 0, 0)
            while task < 2 * blocks:
                half = task // blocks
                start = task % blocks * BLOCK
                stop = min(d_inner, start + BLOCK)
                first_row = half * d_inner
                multiply(
                    x, d_model, batch, pointer(f.in_proj, weight), d_model, first_row + start, first_row + stop, both,
                    2 * d_inner, in_bias, f.in_bias != 0,
                )  # fmt: skip
                if half == 0:
                    _convolve(f, both, u, start, stop, lanes, taps, edge, zero)
                task = _next(counters, 0, 1)
            _wait(counters, 0, 2 * blocks, f.give_way)

            task = _next(counters, 1, 0)
            while task < blocks_of_low:
                start = task * SMALL_BLOCK
                stop = min(low_width, start + SMALL_BLOCK)
                multiply(
                    u, d_inner, batch, pointer(f.x_proj, weight), d_inner, start, stop, low, low_width, nothing, False
                )
                task = _next(counters, 1, 1)
            _wait(counters, 1, blocks_of_low, f.give_way)

            task = _next(counters, 2, 0)
            while task < blocks:
                start = task * BLOCK
                stop = min(d_inner, start + BLOCK)
                multiply(
                    low, low_width, batch, pointer(f.dt_proj, weight), f.dt_rank, start, stop, delta, d_inner, dt_bias,
                    True,
                )
                _advance(f, both, u, delta, low, start, stop, lanes, edge, zero)
                task = _next(counters, 2, 1)
            _wait(counters, 2, blocks, f.give_way)

            task = _next(counters, 3, 0)
            while task < blocks_of_out:
                start = task * BLOCK
                stop = min(d_model, start + BLOCK)
                multiply(
                    u, d_inner, batch, pointer(f.out_proj, weight), d_inner, start, stop, out, d_model, out_bias,
                    f.out_bias != 0,
                )
                task = _next(counters, 3, 1)
        buffer[0] = 0  # see `aligned`
        return DONE

    return step
