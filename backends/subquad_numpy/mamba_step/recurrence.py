"""What a step of a Mamba block computes between its products: norm, convolution, recurrence, gate."""

from math import sqrt
from typing import Any

from subquad_numpy.codegen import add_where_zero, apart, load, total
from subquad_numpy.codegen.copies import load_part, store_part
from subquad_numpy.codegen.vector_math import LOG2_E, sigmoid, softplus, split_exp2
from subquad_numpy.mamba_step.layout import BLOCK


@apart
def normalise(x: Any, weight: Any, batch: int, d_model: int, eps: float, normed: Any) -> None:
    """weight ∘ x / √(mean(x²) + eps), row by row; the mean is summed in float64."""
    for item in range(batch):
        squares = 0.0
        for i in range(d_model):
            value = float(x[item * d_model + i])
            squares += value * value
        factor = 1.0 / sqrt(squares / d_model + eps)
        for i in range(d_model):
            normed[item * d_model + i] = x[item * d_model + i] * factor * weight[i]


@apart
def convolve(
    batch: int, d: int, width: int, both: Any, u: Any, start: int, stop: int, lanes: int, given: Any, bias: Any,
    has_bias: bool, conv: Any, new_conv: Any, taps: Any, edge: Any,
) -> None:  # fmt: skip
    """u = silu(bias + Σ_k taps[k] input[k]) of a block of channels, and the inputs that the next step needs.

    `taps` is scratch for the taps of the block, those of one place in a row.
    """
    history = width - 1
    for c in range(start, stop):
        for k in range(width):
            taps[k * BLOCK + c - start] = given[c * width + k]
    for item in range(batch):
        for c in range(start, stop, lanes):
            count, row = stop - c, item * history * d + c
            new = load_part(both, item * 2 * d + c, count, lanes, edge)
            s = load(taps, history * BLOCK + c - start) * new
            if has_bias:
                s = s + load_part(bias, c, count, lanes, edge)
            for k in range(history):
                before = load_part(conv, row + k * d, count, lanes, edge)
                s = load(taps, k * BLOCK + c - start) * before + s
                if k > 0:
                    store_part(new_conv, row + (k - 1) * d, before, count, lanes, edge)
            if history > 0:
                store_part(new_conv, row + (history - 1) * d, new, count, lanes, edge)
            store_part(u, item * d + c, s * sigmoid(s), count, lanes, edge)


@apart
def advance(
    batch: int, d: int, d_state: int, rank: int, both: Any, u: Any, sums: Any, delta: Any, low: Any, start: int,
    stop: int, lanes: int, A_log: Any, D: Any, ssm: Any, new_ssm: Any, edge: Any,
) -> None:  # fmt: skip
    """The recurrence of a block of channels, whose states are vectors; y is written over u, C · h into `sums`."""
    low_width = rank + 2 * d_state
    for item in range(batch):
        for c in range(start, stop, lanes):
            at = item * d + c
            store_part(delta, at, softplus(load_part(delta, at, stop - c, lanes, edge)), stop - c, lanes, edge)
    for c in range(start, stop):
        for s in range(0, d_state, lanes):
            count = d_state - s
            growth, whole = split_exp2(load_part(A_log, c * d_state + s, count, lanes, edge) * LOG2_E)
            rate = add_where_zero(whole, growth, growth * 0.0 + 1.0) * -LOG2_E  # A in powers of 2: A = −exp(A_log)
            for item in range(batch):
                step, x = delta[item * d + c], u[item * d + c]
                B, at = item * low_width + rank + s, (item * d + c) * d_state + s
                factor, whole = split_exp2(rate * step)
                h = load_part(ssm, at, count, lanes, edge)
                h = add_where_zero(whole, factor * h + load_part(low, B, count, lanes, edge) * (step * x), h)
                store_part(new_ssm, at, h, count, lanes, edge)
                part = total(h * load_part(low, B + d_state, count, lanes, edge))
                sums[item * d + c] = part if s == 0 else sums[item * d + c] + part
    for item in range(batch):
        for c in range(start, stop, lanes):
            at, count = item * d + c, stop - c
            gate = load_part(both, item * 2 * d + d + c, count, lanes, edge)
            y = load_part(D, c, count, lanes, edge) * load_part(u, at, count, lanes, edge)
            y = load_part(sums, at, count, lanes, edge) + y
            store_part(u, at, y * (gate * sigmoid(gate)), count, lanes, edge)
