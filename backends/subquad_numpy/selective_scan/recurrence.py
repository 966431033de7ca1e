"""What both passes of the scan compute before the states: steps, gates, and what decays follow from.

A run is of pairs of vectors of channels: those of one step of time, or one of them through the steps of a tile. What
belongs to one pair lies in scratch, `pitch` numbers before that of the next. Each function takes a whole run: the
constants of its polynomials then stay in registers, and the chains of several pairs advance together. What is written
once is not read again: a store of 64 bytes takes two cycles.
"""

from typing import Any

from subquad_numpy.codegen import (
    absolute,
    at_least,
    at_most,
    bits_where_zero,
    inline,
    load,
    masked,
    merged,
    positive_part,
    prefetch,
    replace_where_zero,
    shifted,
    signs,
    store,
    where_negative,
    where_signed,
)
from subquad_numpy.codegen.side_by_side import LEAST_EXPONENT, MOST_EXPONENT, log1p_to_1, moderate_exp, scaled_exp2
from subquad_numpy.codegen.stored import Rows, StoredRows, load_stored
from subquad_numpy.codegen.vector_math import ONE, polynomial
from subquad_numpy.runtime.stored import AS_COMPUTED

# Rates at equal distances are so but for rounding: they differ by less than this, relative to their size.
EQUAL = polynomial((2.0**-22,), (2.0**-51,))
TINY = polynomial((1e-36,), (1e-300,))
# Bounds of what steps and gates take the exponential of, and of z
LOWEST_STEP = polynomial(*LEAST_EXPONENT)
LOWEST_GATE = polynomial(*((-most,) for (most,) in MOST_EXPONENT))
HIGHEST_GATE = polynomial(*((-least,) for (least,) in LEAST_EXPONENT))
FEW_STATES = 4  # for fewer states, powers gain nothing


@merged
def find_gaps(Ar: Any, vectors: int, d_state: int, lanes: int, bases: Any, gaps: Any, even: Any) -> None:
    """Find the vectors of channels whose rates are A[s] = A[0] + s gap with A[0], gap <= 0, as Mamba's are at first.

    `bases` and `gaps` take A[0] and the gap of each channel, even[v * lanes] whether all channels of vector v have one.
    Gaps that are A[0] but for rounding are A[0].
    """
    for v in range(vectors):
        row = v * lanes * d_state
        base = load(Ar, row)
        gap = (load(Ar, row + (d_state - 1) * lanes) - base) * (1.0 / max(1, d_state - 1))
        if signs(absolute(gap - base) + base * EQUAL(base)) == (1 << lanes) - 1:
            gap = base
        found = signs(gap - TINY(gap)) & signs(base - TINY(base))
        for s in range(d_state):
            rate = load(Ar, row + s * lanes)
            found &= signs(absolute(rate - (base + gap * s)) - (absolute(rate) * EQUAL(rate) + TINY(rate)))
        store(bases, v * lanes, base)
        store(gaps, v * lanes, gap)
        even[v * lanes] = 1 if found == (1 << lanes) - 1 and d_state >= FEW_STATES else 0


@inline
def ask_for_pair(rows: Rows, i: int, lanes: int) -> None:
    """Prefetch two vectors of row i: three lines, since few rows begin with one."""
    prefetch(rows[0], i * rows[1])
    prefetch(rows[0], i * rows[1] + lanes)
    prefetch(rows[0], i * rows[1] + 2 * lanes - 1)


@merged
def open_run(
    count: int, pitch: int, lanes: int, delta: StoredRows, u: StoredRows, z: StoredRows, asks: bool,
    asked: tuple[Rows, Rows, Rows, Rows], bias: Rows, has_z: bool, softplus: bool, slopes_too: bool, drives_too: bool,
    steps: Any, inputs: Any, gates: Any, slopes: Any, gate_slopes: Any, skip: Any, outs: Any,
) -> None:  # fmt: skip
    """Write Δ, u and silu(z); if asked, the slopes of the softplus and of silu, or Δ u in place of u, and D u.

    If it `asks`, the rows of `asked` are prefetched. Without z, its rows are those of Δ.
    """
    for i in range(count):
        if asks:
            ask_for_pair(asked[0], i, lanes)
            ask_for_pair(asked[1], i, lanes)
            ask_for_pair(asked[2], i, lanes)
            ask_for_pair(asked[3], i, lanes)
        at, to = i * pitch, i * pitch + lanes
        of_bias, in_delta, in_u, in_z = shifted(bias[0], i * bias[1]), i * delta[1], i * u[1], i * z[1]
        if delta[2] | u[2] | z[2] == AS_COMPUTED:  # one question for all rows, where it is the usual case
            x, y = load(delta[0], in_delta), load(delta[0], in_delta + lanes)
            v, w = load(u[0], in_u), load(u[0], in_u + lanes)
            g, k = load(z[0], in_z), load(z[0], in_z + lanes)
        else:
            x, y = load_stored(delta[0], delta[2], in_delta), load_stored(delta[0], delta[2], in_delta + lanes)
            v, w = load_stored(u[0], u[2], in_u), load_stored(u[0], u[2], in_u + lanes)
            g, k = load_stored(z[0], z[2], in_z), load_stored(z[0], z[2], in_z + lanes)
        x, y = x + load(of_bias, 0), y + load(of_bias, lanes)
        if softplus or has_z:
            if not has_z:
                g, k = x, y
            # that of -inf is NaN, as -inf times 0 is
            g = where_negative(g - LOWEST_GATE(g), LOWEST_GATE(g) + (g - g), g)
            k = where_negative(k - LOWEST_GATE(k), LOWEST_GATE(k) + (k - k), k)
            near, near_to = at_most(g, HIGHEST_GATE(g)), at_most(k, HIGHEST_GATE(k))
            low, low_to = at_least(-absolute(x), LOWEST_STEP(x)), at_least(-absolute(y), LOWEST_STEP(y))
            e, e_to, f, f_to = moderate_exp((low, low_to, -near, -near_to))
            if softplus:
                if slopes_too:
                    store(slopes, at, where_signed(x, e, ONE(x)) / (e + 1.0))
                    store(slopes, to, where_signed(y, e_to, ONE(y)) / (e_to + 1.0))
                grown, grown_to = log1p_to_1((e, e_to))
                x, y = positive_part(x) + grown, positive_part(y) + grown_to
            if has_z:
                _open_gate(g, near, f, slopes_too, gates, gate_slopes, at)
                _open_gate(k, near_to, f_to, slopes_too, gates, gate_slopes, to)
        store(steps, at, x)
        store(steps, to, y)
        if drives_too:
            store(outs, at, v * load(skip, 0))
            store(outs, to, w * load(skip, lanes))
            v, w = x * v, y * w
        store(inputs, at, v)
        store(inputs, to, w)


@inline
def _open_gate(z: Any, near: Any, far: Any, slopes_too: bool, gates: Any, gate_slopes: Any, at: int) -> None:
    """Write silu(z) and, if asked, its slope, for far = exp(-near), where z is `near` or opens the gate wholly.

    No z is so low that `far` overflows. A gate below the normal numbers then is closed but for a number as small.
    """
    if slopes_too:
        opened = ONE(z) / (far + 1.0)
        store(gates, at, z * opened)
        store(gate_slopes, at, opened * (near * (far * opened) + 1.0))
    else:
        store(gates, at, z / (far + 1.0))


@merged
def start_powers(
    count: int, pitch: int, lanes: int, steps: Any, bases: Any, gaps: Any, factors: Any, ratios: Any, mores: Any,
    kepts: Any,
) -> None:  # fmt: skip
    """Write what the decays exp(Δ A[s]) = exp(Δ A[0]) exp(Δ gap)^s of a pair follow from, for each of `count` steps.

    The decay of state s times h is f h + masked(h, kept), where f begins with `factor` at s = 0, and goes on to the
    next state as ratio f + more. Where |Δ A[0]| < 1/2 (in powers of 2), f is the decay less 1, with all its digits, and
    `kept` has all bits set. Elsewhere f is the decay, so that the fastest ones keep their digits too. Where the gap is
    A[0], as in Mamba's rates at first, one exponential is both.
    """
    base, base_to, gap, gap_to = load(bases, 0), load(bases, lanes), load(gaps, 0), load(gaps, lanes)
    alike = signs(absolute(base - gap) - TINY(base)) & signs(absolute(base_to - gap_to) - TINY(base))
    if alike == (1 << lanes) - 1:
        for i in range(count):
            at, to = i * pitch, i * pitch + lanes
            p, p_to, r, r_to = scaled_exp2((load(steps, at) * base, load(steps, to) * base_to))
            _keep_powers(p, r, p, r, factors, ratios, mores, kepts, at)
            _keep_powers(p_to, r_to, p_to, r_to, factors, ratios, mores, kepts, to)
        return
    for i in range(count):
        at, to = i * pitch, i * pitch + lanes
        x, y = load(steps, at), load(steps, to)
        p, p_to, q, q_to, r, r_to, t, t_to = scaled_exp2((x * base, y * base_to, x * gap, y * gap_to))
        _keep_powers(p, r, q, t, factors, ratios, mores, kepts, at)
        _keep_powers(p_to, r_to, q_to, t_to, factors, ratios, mores, kepts, to)


@inline
def _keep_powers(p: Any, r: Any, q: Any, t: Any, factors: Any, ratios: Any, mores: Any, kepts: Any, at: int) -> None:
    """Write the notes of `start_powers` for one vector, from the two parts of exp(Δ A[0]), and of exp(Δ gap)."""
    near = p - 1.0
    kept = bits_where_zero(near)
    store(factors, at, replace_where_zero(near, p * r + p, r))
    store(ratios, at, q * t + q)
    store(mores, at, masked(q * t + (q - 1.0), kept))
    store(kepts, at, kept)
