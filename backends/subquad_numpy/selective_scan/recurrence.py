"""What both passes of the scan compute for one step of a block of channels: steps, gates, decays, the next states."""

from typing import Any

from subquad_numpy.codegen import (
    absolute,
    bits_where_zero,
    load,
    masked,
    merged,
    replace_where_zero,
    signs,
    spread,
    store,
    where_negative,
)
from subquad_numpy.codegen.side_by_side import exp_negative, scaled_exp2
from subquad_numpy.codegen.stored import load_stored_part, stored_as
from subquad_numpy.codegen.vector_math import ONE, polynomial, sigmoid_from, softplus_from

# Rates at equal distances are so but for rounding: they differ by less than this, relative to their size.
EQUAL = polynomial((2.0**-22,), (2.0**-51,))
TINY = polynomial((1e-36,), (1e-300,))
FEW_STATES = 4  # for fewer states, powers gain nothing


@merged
def find_gaps(Ar: Any, vectors: int, d_state: int, lanes: int, bases: Any, gaps: Any, even: Any) -> None:
    """Find the vectors of channels whose rates are A[s] = A[0] + s gap with A[0], gap <= 0, as Mamba's are at first.

    `bases` and `gaps` take A[0] and the gap of each channel, even[v * lanes] whether all channels of vector v have one.
    """
    for v in range(vectors):
        row = v * lanes * d_state
        base = load(Ar, row)
        gap = (load(Ar, row + (d_state - 1) * lanes) - base) * (1.0 / max(1, d_state - 1))
        found = signs(gap - TINY(gap)) & signs(base - TINY(base))
        for s in range(d_state):
            rate = load(Ar, row + s * lanes)
            found &= signs(absolute(rate - (base + gap * s)) - (absolute(rate) * EQUAL(rate) + TINY(rate)))
        store(bases, v * lanes, base)
        store(gaps, v * lanes, gap)
        even[v * lanes] = 1 if found == (1 << lanes) - 1 and d_state >= FEW_STATES else 0


@merged
def read_step(
    delta: Any, u: Any, z: Any, stored: int, row: int, width: int, lanes: int, edge: Any, bias: Any, has_z: bool,
    softplus: bool, slopes_too: bool, steps: Any, inputs: Any, gates: Any, slopes: Any, gate_slopes: Any,
) -> None:  # fmt: skip
    """Write Δ, u and silu(z) of one step; if asked, also the slopes of the softplus and of silu.

    Rows in scratch are whole pairs of vectors.
    """
    for at in range(0, width, 2 * lanes):
        to = at + lanes
        store(inputs, at, load_stored_part(u, stored_as(stored, 0), row + at, width - at, lanes, edge))
        store(inputs, to, load_stored_part(u, stored_as(stored, 0), row + to, width - to, lanes, edge))
        x = load_stored_part(delta, stored_as(stored, 1), row + at, width - at, lanes, edge) + load(bias, at)
        y = load_stored_part(delta, stored_as(stored, 1), row + to, width - to, lanes, edge) + load(bias, to)
        if softplus or has_z:
            g, k = x, y
            if has_z:
                g = load_stored_part(z, stored_as(stored, 2), row + at, width - at, lanes, edge)
                k = load_stored_part(z, stored_as(stored, 2), row + to, width - to, lanes, edge)
            e = exp_negative((-absolute(x), -absolute(y), -absolute(g), -absolute(k)))
            if slopes_too:
                store(slopes, at, sigmoid_from(x, e[0]))
                store(slopes, to, sigmoid_from(y, e[1]))
                far_g, far_k = ONE(g) / (e[2] + 1.0), ONE(k) / (e[3] + 1.0)
                near_g, near_k = e[2] * far_g, e[3] * far_k
                open_g, open_k = where_negative(g, near_g, far_g), where_negative(k, near_k, far_k)
                store(gates, at, g * open_g)
                store(gates, to, k * open_k)
                store(gate_slopes, at, open_g * (g * where_negative(g, far_g, near_g) + 1.0))
                store(gate_slopes, to, open_k * (k * where_negative(k, far_k, near_k) + 1.0))
            else:
                store(gates, at, g * sigmoid_from(g, e[2]))
                store(gates, to, k * sigmoid_from(k, e[3]))
            if softplus:
                x, y = softplus_from(x, e[0]), softplus_from(y, e[1])
        store(steps, at, x)
        store(steps, to, y)


@merged
def start_powers(
    steps: Any, bases: Any, gaps: Any, even: Any, width: int, lanes: int, factors: Any, ratios: Any, mores: Any,
    kepts: Any,
) -> None:  # fmt: skip
    """Write what the decays exp(Δ A[s]) = exp(Δ A[0]) exp(Δ gap)^s of one step follow from, where rates are even.

    The decay of state s times h is f h + masked(h, kept), where f begins with `factor` at s = 0, and goes on to the
    next state as ratio f + more. Where |Δ A[0]| < 1/2 (in powers of 2), f is the decay less 1, with all its digits, and
    `kept` has all bits set. Elsewhere f is the decay, so that the fastest ones keep their digits too.
    """
    for at in range(0, width, 2 * lanes):
        to = at + lanes
        if even[at] != 0 or even[to] != 0:
            x, y = load(steps, at), load(steps, to)
            p, p_to, q, q_to, r, r_to, t, t_to = scaled_exp2(
                (x * load(bases, at), y * load(bases, to), x * load(gaps, at), y * load(gaps, to))
            )
            near, near_to = p - 1.0, p_to - 1.0
            store(factors, at, replace_where_zero(near, p * r + p, r))
            store(factors, to, replace_where_zero(near_to, p_to * r_to + p_to, r_to))
            store(ratios, at, q * t + q)
            store(ratios, to, q_to * t_to + q_to)
            store(mores, at, masked(q * t + (q - 1.0), bits_where_zero(near)))
            store(mores, to, masked(q_to * t_to + (q_to - 1.0), bits_where_zero(near_to)))
            store(kepts, at, bits_where_zero(near))
            store(kepts, to, bits_where_zero(near_to))


@merged
def advance(
    states: Any, at: int, d_state: int, lanes: int, step: Any, drive: Any, out: Any, Ar: Any, B: Any, row_of_B: int,
    Br: Any, constant_B: bool, C: Any, row_of_C: int, Cr: Any, constant_C: bool, is_even: bool, factors: Any,
    ratios: Any, mores: Any, kepts: Any,
) -> Any:  # fmt: skip
    """out + C · h, where the real states h of the vector of channels at `at` go one step on."""
    top = at * d_state
    if is_even:
        factor, ratio, more, kept = load(factors, at), load(ratios, at), load(mores, at), load(kepts, at)
        for s in range(d_state):
            i = top + s * lanes
            b = load(Br, i) if constant_B else spread(B, row_of_B + s)
            c = load(Cr, i) if constant_C else spread(C, row_of_C + s)
            h = load(states, i)
            h = (factor * h + drive * b) + masked(h, kept)
            store(states, i, h)
            out = out + h * c
            factor = factor * ratio + more
        return out
    last = d_state - 1
    for s in range(0, d_state, 2):
        s1 = min(s + 1, last)
        i, i1 = top + s * lanes, top + s1 * lanes
        p, p1, r, r1 = scaled_exp2((step * load(Ar, i), step * load(Ar, i1)))
        h, h1 = load(states, i) * p, load(states, i1) * p1
        h = h + (r * h + drive * (load(Br, i) if constant_B else spread(B, row_of_B + s)))
        h1 = h1 + (r1 * h1 + drive * (load(Br, i1) if constant_B else spread(B, row_of_B + s1)))
        store(states, i, h)
        store(states, i1, h1)
        out = out + h * (load(Cr, i) if constant_C else spread(C, row_of_C + s))
        if s1 > s:
            out = out + h1 * (load(Cr, i1) if constant_C else spread(C, row_of_C + s1))
    return out
