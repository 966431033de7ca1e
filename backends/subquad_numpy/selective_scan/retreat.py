"""The gradient of the scan through one tile of time, for real states: two vectors of channels after the other.

What a step of two vectors of channels gives to all states is read and computed once, into `notes`. Then a few of their
states go through the tile and back, before the next ones. These states, their gradients and the sums over time stay in
registers, and what they leave behind on the way fits into a first-level cache.
"""

from typing import Any

from subquad_numpy.codegen import halved, inline, load, masked, merged, prefetch_far, shifted, split, store, zeros
from subquad_numpy.codegen.stored import Rows
from subquad_numpy.selective_scan.advance import (
    DRIVE,
    FACTOR,
    HAS_MANY_REGISTERS,
    KEPT,
    STEP,
    add_out,
    are_moderate,
    decays_of,
    longest_step,
    powers_of,
)
from subquad_numpy.selective_scan.four import (
    AT_ONCE,
    Four,
    add,
    add_over_channels,
    add_up_four,
    keep,
    loaded,
    mapped,
    plus,
    times,
)
from subquad_numpy.selective_scan.notes import ALONG_A, ALONG_B, NOTES, G

TOGETHER = 2 if HAS_MANY_REGISTERS else 1  # vectors that share B, C and sums: others have half the registers
LEFT = 3 * AT_ONCE  # vectors that states leave behind at each step: themselves, and the two parts of decays


@merged
def through_tile(
    notes: Any, left: Any, length: int, lanes: int, d_state: int, count: int, even: Any, has_z: bool, states: Any,
    Gr: Any, Ar: Any, sum_A: Any, B: Any, B_step: int, constant_B: bool, by_B: Any, by_B_step: int, C: Any, C_step: int,
    constant_C: bool, by_C: Any, by_C_step: int, resets: Any, reset_step: int, has_resets: bool,
    asked: tuple[Rows, Rows, Rows, Rows, Rows, Rows, Rows],
) -> None:  # fmt: skip
    """Take all states of `count` vectors of channels, one or two, through the tile and back.

    `states` are those before the tile. `Gr` is exp(x) G of the step after the tile, and becomes that of its first step.
    The sums `by_B` and `by_C` have one vector for each state of a constant map, else `quarters` of four states. Steps
    are the distances between two steps of time.
    The first four rounds prefetch the rows of `asked`, those of one array on the way there, of another one back.
    """
    two = TOGETHER == 2 and count == 2 and (even[0] != 0) == (even[lanes] != 0)
    longest = longest_step(notes, NOTES * 2 * lanes, length, lanes)
    longest_to = longest_step(shifted(notes, (count - 1) * lanes), NOTES * 2 * lanes, length, lanes)
    for first in range(0, d_state, AT_ONCE):
        j, to = first * lanes, ((count - 1) * d_state + first) * lanes
        is_whole = first + AT_ONCE <= d_state
        there, back = asked[6], asked[5]
        if first == 0:
            there, back = asked[0], asked[1]
        elif first == AT_ONCE:
            there, back = asked[2], asked[3]
        elif first == 2 * AT_ONCE:
            there, back = asked[4], asked[5]
        if is_whole and even[0] == 0:
            is_whole = are_moderate(longest, shifted(Ar, j), lanes)
        if is_whole and even[(count - 1) * lanes] == 0:
            is_whole = are_moderate(longest_to, shifted(Ar, to), lanes)
        if is_whole and two:
            _of_kind(
                True, True, 0, first, notes, left, length, lanes, d_state, even, has_z, states, Gr, Ar, sum_A, B,
                B_step, constant_B, by_B, by_B_step, C, C_step, constant_C, by_C, by_C_step, resets, reset_step,
                has_resets, there, back,
            )  # fmt: skip
            continue
        for v in range(count):  # one after the other: the same sums over channels then are at hand
            if is_whole:
                _of_kind(
                    True, False, v, first, notes, left, length, lanes, d_state, even, has_z, states, Gr, Ar, sum_A, B,
                    B_step, constant_B, by_B, by_B_step, C, C_step, constant_C, by_C, by_C_step, resets, reset_step,
                    has_resets, there, back,
                )  # fmt: skip
                continue
            for s in range(first, min(first + AT_ONCE, d_state)):
                _of_kind(
                    False, False, v, s, notes, left, length, lanes, d_state, even, has_z, states, Gr, Ar, sum_A, B,
                    B_step, constant_B, by_B, by_B_step, C, C_step, constant_C, by_C, by_C_step, resets, reset_step,
                    has_resets, there, back,
                )  # fmt: skip


@merged
def _of_kind(
    few: bool, two: bool, v: int, s: int, notes: Any, left: Any, length: int, lanes: int, d_state: int, even: Any,
    has_z: bool, states: Any, Gr: Any, Ar: Any, sum_A: Any, B: Any, B_step: int, constant_B: bool, by_B: Any,
    by_B_step: int, C: Any, C_step: int, constant_C: bool, by_C: Any, by_C_step: int, resets: Any, reset_step: int,
    has_resets: bool, there: Rows, back: Rows,
) -> None:  # fmt: skip
    """`through_tile` of the states from `s` on of vector `v`, and of the next one: by powers where rates are even."""
    now, j, apart = shifted(notes, v * lanes), (v * d_state + s) * lanes, d_state * lanes
    h, G, a, to_A = shifted(states, j), shifted(Gr, j), shifted(Ar, j), shifted(sum_A, j)
    of_sums = s // AT_ONCE * lanes + s % AT_ONCE
    b, to_B = shifted(B, j if constant_B else s), shifted(by_B, j if constant_B else of_sums)
    c, to_C = shifted(C, j if constant_C else s), shifted(by_C, j if constant_C else of_sums)
    there, back = (shifted(there[0], v * lanes), there[1]), (shifted(back[0], v * lanes), back[1])
    if even[v * lanes] != 0:
        _there_and_back(
            _cut(now), _cut(left), length, lanes, few, two, apart, True, has_z, _cut(h), _cut(G), _cut(a), to_A,
            _cut(b), B_step, constant_B, _cut(to_B), by_B_step, _cut(c), C_step, constant_C, _cut(to_C), by_C_step,
            resets, reset_step, has_resets, there, back,
        )  # fmt: skip
    else:
        _there_and_back(
            now, left, length, lanes, few, two, apart, False, has_z, h, G, a, to_A, b, B_step, constant_B, to_B,
            by_B_step, c, C_step, constant_C, to_C, by_C_step, resets, reset_step, has_resets, there, back,
        )  # fmt: skip


@inline
def _cut(memory: Any) -> Any:
    """The same pointer, by halves of vectors on machines of few registers.

    Four states by powers, their gradients and the sums over time then stay in registers. With decays of their own there
    are so many other numbers that it gains nothing.
    """
    return memory if HAS_MANY_REGISTERS else halved(memory)


@split
def _there_and_back(
    notes: Any, left: Any, length: int, lanes: int, few: bool, two: bool, apart: int, is_even: bool, has_z: bool,
    states: Any, Gr: Any, Ar: Any, sum_A: Any, B: Any, B_step: int, constant_B: bool, by_B: Any, by_B_step: int, C: Any,
    C_step: int, constant_C: bool, by_C: Any, by_C_step: int, resets: Any, reset_step: int, has_resets: bool,
    there: Rows, back: Rows,
) -> None:  # fmt: skip
    """`through_tile` of a few states, or of one, of one or `two` vectors, whose matrices lie `apart`.

    Pointers are to what belongs to the first of the states. Halves of a vector go there side by side, as two vectors
    do, and back one after the other.
    """
    halves = is_even and not HAS_MANY_REGISTERS
    part = lanes // 2 if halves else lanes
    # where the second vector or half lies in matrices, in notes, and in what is left
    to, more, beyond = (apart, lanes, LEFT * lanes) if two else (part, part, part) if halves else (0, 0, 0)
    none = (zeros(left), zeros(left), zeros(left), zeros(left))
    a, a_to = loaded(Ar, 0, lanes, few), loaded(Ar, to, lanes, few)
    h, h_to = loaded(states, 0, lanes, few), loaded(states, to, lanes, few)
    for i in range(length):
        if has_resets and resets[i * reset_step] != 0:
            h, h_to = none, none
        now, note, of_B, of_C = (
            shifted(left, 2 * i * LEFT * lanes),
            shifted(notes, i * NOTES * 2 * lanes),
            i * B_step,
            i * C_step,
        )
        _ask(there, i, lanes, few, two)
        if halves:
            _ask(back, i, lanes, few, two)
        h = _there(h, a, note, now, mapped(B, of_B, 0, lanes, few, constant_B), lanes, few, is_even)
        to_C = times(load(note, G * 2 * lanes), h)
        if has_z:
            add_out(note, h, mapped(C, of_C, 0, lanes, few, constant_C), lanes, few)
        if two or halves:
            note, now = shifted(note, more), shifted(now, beyond)
            h_to = _there(h_to, a_to, note, now, mapped(B, of_B, to, lanes, few, constant_B), lanes, few, is_even)
            if has_z:
                add_out(note, h_to, mapped(C, of_C, to, lanes, few, constant_C), lanes, few)
            to_C_to = times(load(note, G * 2 * lanes), h_to)
            if constant_C:
                add(by_C, to, to_C_to, lanes, few)
            else:
                to_C = plus(to_C, to_C_to)
        if constant_C:
            add(by_C, 0, to_C, lanes, few)
        else:
            add_over_channels(by_C, i * by_C_step, to_C, few)

    for k in range(0, lanes, part):
        a = loaded(Ar, k, lanes, few)
        w, w_to = loaded(Gr, k, lanes, few), loaded(Gr, k + to, lanes, few)
        by_A, by_A_to = none, none
        for i in range(length - 1, -1, -1):
            now, note, of_B, of_C = (
                shifted(left, 2 * i * LEFT * lanes + k),
                shifted(notes, i * NOTES * 2 * lanes + k),
                i * B_step,
                i * C_step,
            )
            b, c = mapped(B, of_B, k, lanes, few, constant_B), mapped(C, of_C, k, lanes, few, constant_C)
            if not halves:
                _ask(back, i, lanes, few, two)
            w, by_A, to_B = _back(w, by_A, a, note, now, b, c, lanes, few, is_even)
            if two:
                b, c = mapped(B, of_B, to, lanes, few, constant_B), mapped(C, of_C, to, lanes, few, constant_C)
                note, now = shifted(note, more), shifted(now, beyond)
                w_to, by_A_to, to_B_to = _back(w_to, by_A_to, a_to, note, now, b, c, lanes, few, is_even)
                if constant_B:
                    add(by_B, to, to_B_to, lanes, few)
                else:
                    to_B = plus(to_B, to_B_to)
            if constant_B:
                add(by_B, k, to_B, lanes, few)
            else:
                add_over_channels(by_B, i * by_B_step + k, to_B, few)
            if has_resets and resets[i * reset_step] != 0:  # no step before sees what comes after
                w, w_to = none, none
        keep(Gr, k, w, lanes, few)
        add_up_four(sum_A, k, by_A, lanes, few)
        if two:
            keep(Gr, to, w_to, lanes, few)
            add_up_four(sum_A, to, by_A_to, lanes, few)


@inline
def _ask(rows: Rows, i: int, lanes: int, few: bool, two: bool) -> None:
    """Prefetch the end of a vector of row i, or of two."""
    if few:
        prefetch_far(rows[0], i * rows[1] + lanes - 1)
        if two:
            prefetch_far(rows[0], i * rows[1] + 2 * lanes - 1)


@inline
def _there(h: Four, a: Four, note: Any, left: Any, b: Four, lanes: int, few: bool, is_even: bool) -> Four:
    """The states after a step from h on; `left` takes h, and decays that are no powers."""
    keep(left, 0, h, lanes, few)
    drive = load(note, DRIVE * 2 * lanes)
    if is_even:
        f, _ = powers_of(note, lanes, few)
        kept = load(note, KEPT * 2 * lanes)
        k0, k1, k2, k3 = masked(h[0], kept), masked(h[1], kept), masked(h[2], kept), masked(h[3], kept)
    else:
        p, f = decays_of(a, load(note, STEP * 2 * lanes), few)
        keep(left, AT_ONCE * lanes, p, lanes, few)
        keep(left, 2 * AT_ONCE * lanes, f, lanes, few)
        k0, k1, k2, k3 = h[0] * p[0], h[1] * p[1], h[2] * p[2], h[3] * p[3]
        h = k0, k1, k2, k3
    # Rounded once more than in the forward pass, and one operation less: errors add up over this tile alone.
    return (
        f[0] * h[0] + (drive * b[0] + k0), f[1] * h[1] + (drive * b[1] + k1), f[2] * h[2] + (drive * b[2] + k2),
        f[3] * h[3] + (drive * b[3] + k3),
    )  # fmt: skip


@inline
def _back(
    w: Four, by_A: Four, a: Four, note: Any, left: Any, b: Four, c: Four, lanes: int, few: bool, is_even: bool
) -> tuple[Four, Four, Four]:
    """(exp(x) G, the sums ∂A, Δ u G) of a step, from w = exp(x) G of the next one on."""
    step, g = load(note, STEP * 2 * lanes), load(note, G * 2 * lanes)
    G0, G1, G2, G3 = w[0] + g * c[0], w[1] + g * c[1], w[2] + g * c[2], w[3] + g * c[3]
    along_A, along_B = load(note, ALONG_A * 2 * lanes), load(note, ALONG_B * 2 * lanes) + b[0] * G0
    if few:
        along_B = along_B + b[1] * G1 + b[2] * G2 + b[3] * G3
    store(note, ALONG_B * 2 * lanes, along_B)
    to_B = times(load(note, DRIVE * 2 * lanes), (G0, G1, G2, G3))
    if is_even:
        f, following = powers_of(note, lanes, few)
        kept = load(note, KEPT * 2 * lanes)
        store(note, FACTOR * 2 * lanes, following)
        G0, G1 = f[0] * G0 + masked(G0, kept), f[1] * G1 + masked(G1, kept)
        G2, G3 = f[2] * G2 + masked(G2, kept), f[3] * G3 + masked(G3, kept)
    else:
        p, r = loaded(left, AT_ONCE * lanes, lanes, few), loaded(left, 2 * AT_ONCE * lanes, lanes, few)
        G0, G1, G2, G3 = G0 * p[0], G1 * p[1], G2 * p[2], G3 * p[3]
        G0, G1, G2, G3 = r[0] * G0 + G0, r[1] * G1 + G1, r[2] * G2 + G2, r[3] * G3 + G3
    h = loaded(left, 0, lanes, few)
    X0, X1, X2, X3 = G0 * h[0], G1 * h[1], G2 * h[2], G3 * h[3]
    along_A = along_A + a[0] * X0
    if few:
        along_A = along_A + a[1] * X1 + a[2] * X2 + a[3] * X3
    store(note, ALONG_A * 2 * lanes, along_A)
    return (G0, G1, G2, G3), plus(by_A, times(step, (X0, X1, X2, X3))), to_B
