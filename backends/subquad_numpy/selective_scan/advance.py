"""The scan through one tile of time, for the real states of two vectors of channels.

What a step of two vectors of channels gives to all states is read and computed once, into notes. Then a few of their
states go through the tile in registers, before the next ones, and add what they give to the output that is noted.

Notes of a step lie `pitch` numbers before those of the next one; each has two vectors.
"""

from typing import Any

from subquad_numpy.codegen import (
    absolute,
    at_least,
    inline,
    load,
    masked,
    merged,
    prefetch,
    processor,
    product,
    shifted,
    signs,
    split,
    store,
    zeros,
)
from subquad_numpy.codegen.side_by_side import decays, moderate_decays
from subquad_numpy.codegen.stored import Rows, padded_rows_of, round_row, shifted_stored, store_stored, stored_as
from subquad_numpy.codegen.vector_math import polynomial
from subquad_numpy.runtime.stored import AS_COMPUTED
from subquad_numpy.selective_scan.four import AT_ONCE, Four, along, driven, keep, loaded, mapped
from subquad_numpy.selective_scan.recurrence import open_run, start_powers

Map = tuple[Any, int, bool]  # B or C, where a step of time begins, and whether it is constant
STEP, DRIVE, OUT, FACTOR, RATIO, MORE, KEPT = range(7)  # the notes that both passes have; OUT is C · h + D u
GATE, NOTES = 7, 8
MODERATE = polynomial((126.0,), (1022.0,))
HAS_MANY_REGISTERS = processor.has("avx512f")  # 32; others have 16, and half as wide


@inline
def noted(notes: Any, what: int, lanes: int) -> Any:
    """Where a note of the first step lies."""
    return shifted(notes, what * 2 * lanes)


@inline
def powers_of(note: Any, lanes: int, few: bool) -> tuple[Four, Any]:
    """(what decays follow from for the states, for the one after them): see `start_powers`."""
    ratio, more = load(note, RATIO * 2 * lanes), load(note, MORE * 2 * lanes)
    f0 = load(note, FACTOR * 2 * lanes)
    f1 = f0 * ratio + more
    f2 = f1 * ratio + more
    f3 = f2 * ratio + more
    return (f0, f1, f2, f3), f3 * ratio + more if few else f1


@inline
def by_powers(h: Four, f: Four, kept: Any, drive: Four) -> Four:
    """The states after a step, from what their decays follow from."""
    return (
        (f[0] * h[0] + drive[0]) + masked(h[0], kept),
        (f[1] * h[1] + drive[1]) + masked(h[1], kept),
        (f[2] * h[2] + drive[2]) + masked(h[2], kept),
        (f[3] * h[3] + drive[3]) + masked(h[3], kept),
    )


@inline
def decays_of(a: Four, step: Any, few: bool) -> tuple[Four, Four]:
    """The two parts of the decays exp(Δ A), which `are_moderate` if they are of a few states: see `decays`."""
    if not few:
        p, r = decays((step * a[0],))
        return (p, p, p, p), (r, r, r, r)
    if HAS_MANY_REGISTERS:
        p0, p1, p2, p3, r0, r1, r2, r3 = moderate_decays((step * a[0], step * a[1], step * a[2], step * a[3]))
        return (p0, p1, p2, p3), (r0, r1, r2, r3)
    p0, p1, r0, r1 = moderate_decays((step * a[0], step * a[1]))
    p2, p3, r2, r3 = moderate_decays((step * a[2], step * a[3]))
    return (p0, p1, p2, p3), (r0, r1, r2, r3)


@merged
def longest_step(notes: Any, pitch: int, length: int, lanes: int) -> Any:
    """The largest |Δ| of each channel of a vector in the tile."""
    longest = absolute(load(notes, STEP * 2 * lanes))
    for i in range(1, length):
        longest = at_least(longest, absolute(load(notes, i * pitch + STEP * 2 * lanes)))
    return longest


@merged
def are_moderate(longest: Any, Ar: Any, lanes: int) -> bool:
    """Whether no |Δ A| of a few states exceeds what `moderate_decays` takes."""
    a = loaded(Ar, 0, lanes, True)
    rate = at_least(at_least(absolute(a[0]), absolute(a[1])), at_least(absolute(a[2]), absolute(a[3])))
    return signs(longest * rate - MODERATE(rate)) == (1 << lanes) - 1


@inline
def by_decays(h: Four, p: Four, r: Four, drive: Four) -> Four:
    """The states after a step, from the two parts of their decays."""
    k0, k1, k2, k3 = h[0] * p[0], h[1] * p[1], h[2] * p[2], h[3] * p[3]
    return (
        k0 + (r[0] * k0 + drive[0]), k1 + (r[1] * k1 + drive[1]), k2 + (r[2] * k2 + drive[2]),
        k3 + (r[3] * k3 + drive[3]),
    )  # fmt: skip


@inline
def add_out(note: Any, h: Four, c: Four, lanes: int, few: bool) -> None:
    """Add C · h of the states to the output that is noted."""
    store(note, OUT * 2 * lanes, along(load(note, OUT * 2 * lanes), h, c, few))


@merged
def advance(
    notes: Any, pitch: int, length: int, lanes: int, d_state: int, count: int, even: Any, states: Any, Ar: Any, B: Any,
    B_step: int, constant_B: bool, C: Any, C_step: int, constant_C: bool, resets: Any, reset_step: int,
    has_resets: bool, asks: bool, asked: tuple[Rows, Rows, Rows, Rows],
) -> None:  # fmt: skip
    """Take all states of `count` vectors of channels, one or two, through the tile.

    Steps are the distances between two steps of time. States go by fours: by powers where rates are even, else
    with the decays of each. Those that are left over go one by one, and so do all where decays are not moderate.
    If it `asks`, the first four rounds prefetch four arrays each step: a burst of so many would wait for memory.
    """
    for v in range(count):
        now, is_even = shifted(notes, v * lanes), even[v * lanes] != 0
        longest = longest_step(now, pitch, length, lanes)
        for first in range(0, d_state, AT_ONCE):
            j = (v * d_state + first) * lanes
            is_whole = first + AT_ONCE <= d_state
            rows = asked[0]
            if asks:
                near, far = asked[1] if first > 0 else asked[0], asked[3] if first > 2 * AT_ONCE else asked[2]
                rows = far if first > AT_ONCE else near
                rows = shifted(rows[0], (v + 1) * lanes - 1), rows[1]
            if is_whole and is_even:
                _advance_by_powers(
                    now, pitch, length, lanes, shifted(states, j), shifted(B, j if constant_B else first), B_step,
                    constant_B, shifted(C, j if constant_C else first), C_step, constant_C, resets, reset_step,
                    has_resets, asks, rows,
                )  # fmt: skip
                continue
            if is_whole and are_moderate(longest, shifted(Ar, j), lanes):
                _advance_by_decays(
                    True, now, pitch, length, lanes, shifted(states, j), shifted(Ar, j),
                    shifted(B, j if constant_B else first), B_step, constant_B,
                    shifted(C, j if constant_C else first), C_step, constant_C, resets, reset_step, has_resets, asks,
                    rows,
                )  # fmt: skip
                continue
            for s in range(first, min(first + AT_ONCE, d_state)):
                j = (v * d_state + s) * lanes
                _advance_by_decays(
                    False, now, pitch, length, lanes, shifted(states, j), shifted(Ar, j),
                    shifted(B, j if constant_B else s), B_step, constant_B, shifted(C, j if constant_C else s), C_step,
                    constant_C, resets, reset_step, has_resets, False, rows,
                )  # fmt: skip


@split
def _advance_by_powers(
    notes: Any, pitch: int, length: int, lanes: int, states: Any, B: Any, B_step: int, constant_B: bool, C: Any,
    C_step: int, constant_C: bool, resets: Any, reset_step: int, has_resets: bool, asks: bool, asked: Rows,
) -> None:  # fmt: skip
    """`advance` of four states of one vector. Pointers are to what belongs to the first one."""
    h, nothing = loaded(states, 0, lanes, True), zeros(notes)
    for i in range(length):
        if has_resets and resets[i * reset_step] != 0:
            h = (nothing, nothing, nothing, nothing)
        note = shifted(notes, i * pitch)
        if asks:
            prefetch(asked[0], i * asked[1])
        drive = driven(load(note, DRIVE * 2 * lanes), mapped(B, i * B_step, 0, lanes, True, constant_B))
        f, following = powers_of(note, lanes, True)
        h = by_powers(h, f, load(note, KEPT * 2 * lanes), drive)
        store(note, FACTOR * 2 * lanes, following)
        add_out(note, h, mapped(C, i * C_step, 0, lanes, True, constant_C), lanes, True)
    keep(states, 0, h, lanes, True)


@split
def _advance_by_decays(
    few: bool, notes: Any, pitch: int, length: int, lanes: int, states: Any, Ar: Any, B: Any, B_step: int,
    constant_B: bool, C: Any, C_step: int, constant_C: bool, resets: Any, reset_step: int, has_resets: bool, asks: bool,
    asked: Rows,
) -> None:  # fmt: skip
    """`advance` of a few states of one vector, or of one. Pointers are to what belongs to the first one.

    Sixteen registers hold two states and what their decays are made of: a few states then stay in memory.
    """
    a, h, nothing = loaded(Ar, 0, lanes, few), loaded(states, 0, lanes, few), zeros(notes)
    stay = few and not HAS_MANY_REGISTERS
    for i in range(length):
        if has_resets and resets[i * reset_step] != 0:
            h = (nothing, nothing, nothing, nothing)
            if stay:
                keep(states, 0, h, lanes, few)
        note = shifted(notes, i * pitch)
        if asks:
            prefetch(asked[0], i * asked[1])
        if stay:
            b, c, out = (B, i * B_step, constant_B), (C, i * C_step, constant_C), load(note, OUT * 2 * lanes)
            out = _take_two_on(out, note, lanes, 0, states, Ar, b, c)
            out = _take_two_on(out, note, lanes, 2, states, Ar, b, c)
            store(note, OUT * 2 * lanes, out)
            continue
        p, r = decays_of(a, load(note, STEP * 2 * lanes), few)
        drive = driven(load(note, DRIVE * 2 * lanes), mapped(B, i * B_step, 0, lanes, few, constant_B))
        h = by_decays(h, p, r, drive)
        add_out(note, h, mapped(C, i * C_step, 0, lanes, few, constant_C), lanes, few)
    if not stay:
        keep(states, 0, h, lanes, few)


@inline
def _take_two_on(out: Any, note: Any, lanes: int, first: int, states: Any, Ar: Any, B: Map, C: Map) -> Any:
    """Take two of a few states a step on, in memory, as `by_decays` does; returns `out` and C · h of both."""
    j, k, step = first * lanes, (first + 1) * lanes, load(note, STEP * 2 * lanes)
    p, q, r, t = moderate_decays((step * load(Ar, j), step * load(Ar, k)))
    x, y, drive = load(states, j) * p, load(states, k) * q, load(note, DRIVE * 2 * lanes)
    b = mapped(B[0], B[1], 0, lanes, True, B[2])
    x, y = x + (r * x + product(drive, b[first])), y + (t * y + product(drive, b[first + 1]))
    store(states, j, x)
    store(states, k, y)
    c = mapped(C[0], C[1], 0, lanes, True, C[2])
    return out + x * c[first] + y * c[first + 1]


@split
def note_tile(
    notes: Any, length: int, delta: Any, u: Any, z: Any, stored: int, row: int, row_step: int, width: int, lanes: int,
    scratch: Any, bias: Any, skip: Any, bases: Any, gaps: Any, is_even: bool, has_z: bool, softplus: bool, asks: bool,
    asked: tuple[Rows, Rows, Rows, Rows],
) -> None:  # fmt: skip
    """Write the notes of the forward pass for two vectors of channels, or for one if `width` has no more.

    If it `asks`, it prefetches. `scratch` has room for three rows of two vectors at each step.
    """
    both = 2 * lanes
    of_u, of_delta, of_z = stored_as(stored, 0), stored_as(stored, 1), stored_as(stored, 2)
    second, third = shifted(scratch, length * both), shifted(scratch, 2 * length * both)
    rows = padded_rows_of(delta, of_delta, row, row_step, length, width, both, lanes, scratch)
    inputs = padded_rows_of(u, of_u, row, row_step, length, width, both, lanes, second)
    opened = rows
    if has_z:
        opened = padded_rows_of(z, of_z, row, row_step, length, width, both, lanes, third)
    pitch = NOTES * both
    steps, drives, outs = noted(notes, STEP, lanes), noted(notes, DRIVE, lanes), noted(notes, OUT, lanes)
    gates, factors, ratios = noted(notes, GATE, lanes), noted(notes, FACTOR, lanes), noted(notes, RATIO, lanes)
    open_run(
        length, pitch, lanes, rows, inputs, opened, asks, asked, (bias, 0), has_z, softplus, False, True, steps, drives,
        gates, gates, gates, skip, outs,
    )  # fmt: skip
    if is_even:
        start_powers(
            length, pitch, lanes, steps, bases, gaps, factors, ratios, noted(notes, MORE, lanes),
            noted(notes, KEPT, lanes),
        )  # fmt: skip


@merged
def write_tile(
    notes: Any, length: int, lanes: int, y: Any, stored: int, row: int, row_step: int, width: int, scratch: Any,
    has_z: bool,
) -> None:  # fmt: skip
    """Write y of two vectors of channels, or of one if `width` has no more."""
    direct, both = width >= 2 * lanes, 2 * lanes
    target = shifted_stored(y, stored, row)
    for i in range(length):
        note = shifted(notes, i * NOTES * both)
        a, b = load(note, OUT * both), load(note, OUT * both + lanes)
        if has_z:
            a, b = a * load(note, GATE * both), b * load(note, GATE * both + lanes)
        if direct and stored == AS_COMPUTED:
            store(target, i * row_step, a)
            store(target, i * row_step + lanes, b)
        elif direct:
            store_stored(target, stored, i * row_step, a)
            store_stored(target, stored, i * row_step + lanes, b)
        else:
            store(scratch, 0, a)
            store(scratch, lanes, b)
            round_row(target, stored, i * row_step, width, lanes, scratch)


@merged
def sum_steps(steps: Any, pitch: int, length: int, sums: Any, rests: Any) -> None:
    """Add Δ of one vector of channels to `sums`, with Kahan's compensation in `rests`: a chunk may be long."""
    total, rest = load(sums, 0), load(rests, 0)
    for i in range(length):
        term = load(steps, i * pitch) - rest
        longer = total + term
        rest, total = (longer - total) - term, longer
    store(sums, 0, total)
    store(rests, 0, rest)
