"""One step through Mamba blocks, each in four phases, between which threads wait for each other.

    1   u, z = in_proj x,  u ← silu(conv(u))                        tasks are blocks of outputs
    2   delta, B, C = x_proj u                                      blocks of outputs
    3   Δ = softplus(dt_proj delta + bias),  h ← exp(Δ A) h + Δ B u,  y = (C · h + D u) silu(z)       of channels
    4   out = out_proj y                                            blocks of outputs

Where a block has a norm, x is normed first, by each thread for itself, and added to the output. Every weight is read
once. A thread takes tasks of a phase until none is left, then waits for those that others have taken. Each *part*, a
task of `runtime.threads`, goes through all phases of all blocks: threads may come at any time, or never.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import aligned, pointer, shifted
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.dots import STORED, multiply
from subquad_numpy.mamba_step.layout import (
    A_LOG,
    BLOCK,
    CONV,
    D_SKIP,
    DT_BIAS,
    DT_PROJ,
    HEAD,
    IN_BIAS,
    IN_PROJ,
    NEW_CONV,
    NEW_SSM,
    NORM,
    OF_LAYER,
    OUT_BIAS,
    OUT_PROJ,
    PHASES,
    SMALL_BLOCK,
    SSM,
    TAPS,
    TAPS_BIAS,
    X_PROJ,
)  # fmt: skip
from subquad_numpy.mamba_step.recurrence import advance, convolve, normalise
from subquad_numpy.mamba_step.turns import next_task, wait


@cache
def step_kernel(dtype: str, stored: str) -> Any:
    """Compile `step(first, last, records)`, for numbers of a real `dtype` and matrices of the dtype `stored`."""
    lanes, kind, zero = element(dtype)
    weight, word, double = STORED[stored], np.int64(0), np.float64(0)
    of_head = len(HEAD)

    @compiled(f"mamba step {dtype} by {stored}", HEAD)
    def step(first: int, last: int, records: Any) -> int:
        record = records
        f = record[0]
        addresses = shifted(pointer(record.ctypes.data, word), of_head)
        batch, d_model, d_inner, d_state, rank, width, give_way = (
            f.batch, f.d_model, f.d_inner, f.d_state, f.dt_rank, f.width, f.give_way,
        )  # fmt: skip
        low_width = rank + 2 * d_state
        bits = np.empty(1, np.int64)
        bits[0] = f.eps
        eps = pointer(bits.ctypes.data, double)[0]
        buffer = np.empty((width + 1) * BLOCK + batch * d_model + 4 * lanes, kind)
        edge = aligned(buffer)
        taps = shifted(edge, lanes)
        normed = shifted(taps, (width + 1) * BLOCK)
        both, counters, nothing = pointer(f.work, zero), pointer(f.counters, word), pointer(0, zero)
        u = shifted(both, batch * 2 * d_inner)
        sums = shifted(u, batch * d_inner)
        delta = shifted(sums, batch * d_inner)
        low = shifted(delta, batch * d_inner)
        out = pointer(f.out, zero)
        blocks = -(-d_inner // BLOCK)  # of channels
        blocks_of_low, blocks_of_out = -(-low_width // SMALL_BLOCK), -(-d_model // BLOCK)
        for layer in range((last - first) * f.layers):
            turn = layer % f.layers
            a = shifted(addresses, turn * OF_LAYER)
            own = shifted(counters, turn * 2 * PHASES)
            x = pointer(f.x, zero)
            if turn > 0:
                x = out
            source = x
            if a[NORM] != 0:
                source = normed

            task = next_task(own, 0, 0)
            if task < 2 * blocks and a[NORM] != 0:
                normalise(x, pointer(a[NORM], zero), batch, d_model, eps, normed)
            while task < 2 * blocks:
                start = task % blocks * BLOCK
                stop = min(d_inner, start + BLOCK)
                row = task // blocks * d_inner
                multiply(
                    source, d_model, batch, pointer(a[IN_PROJ], weight), d_model, row + start, row + stop, both,
                    2 * d_inner, pointer(a[IN_BIAS], zero), a[IN_BIAS] != 0,
                )  # fmt: skip
                if row == 0:
                    convolve(
                        batch, d_inner, width, both, u, start, stop, lanes, pointer(a[TAPS], zero),
                        pointer(a[TAPS_BIAS], zero), a[TAPS_BIAS] != 0, pointer(a[CONV], zero),
                        pointer(a[NEW_CONV], zero), taps, edge,
                    )  # fmt: skip
                task = next_task(own, 0, 1)
            wait(own, 0, 2 * blocks, give_way)

            task = next_task(own, 1, 0)
            while task < blocks_of_low:
                start = task * SMALL_BLOCK
                stop = min(low_width, start + SMALL_BLOCK)
                multiply(
                    u, d_inner, batch, pointer(a[X_PROJ], weight), d_inner, start, stop, low, low_width, nothing, False
                )
                task = next_task(own, 1, 1)
            wait(own, 1, blocks_of_low, give_way)

            task = next_task(own, 2, 0)
            while task < blocks:
                start = task * BLOCK
                stop = min(d_inner, start + BLOCK)
                multiply(
                    low, low_width, batch, pointer(a[DT_PROJ], weight), rank, start, stop, delta, d_inner,
                    pointer(a[DT_BIAS], zero), True,
                )  # fmt: skip
                advance(
                    batch, d_inner, d_state, rank, both, u, sums, delta, low, start, stop, lanes,
                    pointer(a[A_LOG], zero), pointer(a[D_SKIP], zero), pointer(a[SSM], zero),
                    pointer(a[NEW_SSM], zero), edge,
                )  # fmt: skip
                task = next_task(own, 2, 1)
            wait(own, 2, blocks, give_way)

            task = next_task(own, 3, 0)
            while task < blocks_of_out:
                start = task * BLOCK
                stop = min(d_model, start + BLOCK)
                # Δ is not needed any more: its place takes the output before the sum
                multiply(
                    u, d_inner, batch, pointer(a[OUT_PROJ], weight), d_inner, start, stop, delta, d_model,
                    pointer(a[OUT_BIAS], zero), a[OUT_BIAS] != 0,
                )  # fmt: skip
                for item in range(batch):
                    for j in range(item * d_model + start, item * d_model + stop):
                        out[j] = x[j] + delta[j] if a[NORM] != 0 else delta[j]
                task = next_task(own, 3, 1)
            if turn + 1 < f.layers:
                wait(own, 3, blocks_of_out, give_way)
        return DONE

    return step
