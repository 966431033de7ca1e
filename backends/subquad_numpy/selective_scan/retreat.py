"""The gradient of the scan through one tile of time, for real states: two vectors of channels after the other.

What a step of two vectors of channels gives to all states is read and computed once, into `notes`. Then a few of their
states go through the tile and back, before the next ones. These states, their gradients and the sums over time stay in
registers, and what they leave behind on the way fits into a first-level cache.
"""

from typing import Any

from subquad_numpy.codegen import add_up, inline, load, masked, merged, processor, shifted, spread, store, zeros
from subquad_numpy.codegen.copies import clear, load_part, store_part
from subquad_numpy.codegen.side_by_side import scaled_exp2
from subquad_numpy.codegen.vector_math import LOG2_E
from subquad_numpy.selective_scan.recurrence import advance, read_step, start_powers

LN_2 = 1 / LOG2_E
Four = tuple[Any, Any, Any, Any]
TOGETHER = 2 if processor.has("avx512f") else 1  # vectors that share B, C and sums: others have half the registers
AT_ONCE = 4  # states that go through a tile together: more would not fit into sixteen registers
LEFT = 3 * AT_ONCE  # vectors that they leave behind at each step: states, and the two parts of decays
NOTES = 13  # kept of each step, each for two vectors:
STEP, INPUT, GATE, SLOPE, GATE_SLOPE, G, FACTOR, RATIO, MORE, KEPT, OUT, ALONG_A, ALONG_B = range(NOTES)
# G is the gradient by C · h + D u; OUT is the sum C · h + D u; ALONG_A is Σ_s A ∂x, ALONG_B is Σ_s B G


@inline
def noted(notes: Any, i: int, what: int, lanes: int) -> Any:
    """Where a note of step i of the tile lies."""
    return shifted(notes, (i * NOTES + what) * 2 * lanes)


@inline
def note_step(
    notes: Any, i: int, delta: Any, u: Any, z: Any, grad_y: Any, row: int, width: int, lanes: int, edge: Any, at: int,
    bias: Any, skip: Any, bases: Any, gaps: Any, even: Any, has_z: bool, softplus: bool,
) -> None:  # fmt: skip
    """Write the notes of step i for the two vectors of channels from `at` on; `row` is where the first channel lies."""
    steps, inputs = noted(notes, i, STEP, lanes), noted(notes, i, INPUT, lanes)
    gates, gate_slopes = noted(notes, i, GATE, lanes), noted(notes, i, GATE_SLOPE, lanes)
    outs, gs, none = noted(notes, i, OUT, lanes), noted(notes, i, G, lanes), zeros(edge)
    along_A, along_B = noted(notes, i, ALONG_A, lanes), noted(notes, i, ALONG_B, lanes)
    read_step(
        delta, u, z, 0, row + at, min(width - at, 2 * lanes), lanes, edge, shifted(bias, at), has_z, softplus, True,
        steps, inputs, gates, noted(notes, i, SLOPE, lanes), gate_slopes,
    )  # fmt: skip
    start_powers(
        steps, shifted(bases, at), shifted(gaps, at), shifted(even, at), 2 * lanes, lanes,
        noted(notes, i, FACTOR, lanes), noted(notes, i, RATIO, lanes), noted(notes, i, MORE, lanes),
        noted(notes, i, KEPT, lanes),
    )  # fmt: skip
    for k in range(0, 2 * lanes, lanes):
        g = load_part(grad_y, row + at + k, width - at - k, lanes, edge)
        if has_z:
            store(gate_slopes, k, g * load(gate_slopes, k))
            g = g * load(gates, k)
            store(outs, k, load(inputs, k) * load(skip, at + k))
        store(gs, k, g)
        store(along_A, k, none)
        store(along_B, k, none)


@merged
def go_on(
    notes: Any, length: int, lanes: int, d_state: int, is_even: bool, states: Any, Ar: Any, B: Any, B_step: int,
    constant_B: bool, resets: Any, reset_step: int, has_resets: bool,
) -> None:  # fmt: skip
    """Take all states of one vector of channels through the tile, and no gradient back."""
    for i in range(length):
        if has_resets and resets[i * reset_step] != 0:
            clear(states, d_state * lanes)
        step = load(noted(notes, i, STEP, lanes), 0)
        drive = step * load(noted(notes, i, INPUT, lanes), 0)
        advance(
            states, 0, d_state, lanes, step, drive, drive, Ar, B, i * B_step, B, constant_B, B, i * B_step, B,
            constant_B, is_even, noted(notes, i, FACTOR, lanes), noted(notes, i, RATIO, lanes),
            noted(notes, i, MORE, lanes), noted(notes, i, KEPT, lanes),
        )  # fmt: skip


@merged
def through_tile(
    notes: Any, left: Any, length: int, lanes: int, d_state: int, count: int, even: Any, has_z: bool, states: Any,
    Gr: Any, Ar: Any, sum_A: Any, B: Any, B_step: int, constant_B: bool, by_B: Any, by_B_step: int, C: Any, C_step: int,
    constant_C: bool, by_C: Any, by_C_step: int, resets: Any, reset_step: int, has_resets: bool,
) -> None:  # fmt: skip
    """Take all states of `count` vectors of channels, one or two, through the tile and back.

    `states` are those before the tile. `Gr` is exp(x) G of the step after the tile, and becomes that of its first step.
    The sums `by_B` and `by_C` have one vector for each state. Steps are the distances between two steps of time.
    """
    some = d_state // AT_ONCE * AT_ONCE
    two = TOGETHER == 2 and count == 2 and (even[0] != 0) == (even[lanes] != 0)
    for s in range(0, some, AT_ONCE):
        if two:
            _of_kind(
                True, True, 0, s, notes, left, length, lanes, d_state, even, has_z, states, Gr, Ar, sum_A, B, B_step,
                constant_B, by_B, by_B_step, C, C_step, constant_C, by_C, by_C_step, resets, reset_step, has_resets,
            )  # fmt: skip
        else:
            for v in range(count):  # one after the other: the same sums over channels then are at hand
                _of_kind(
                    True, False, v, s, notes, left, length, lanes, d_state, even, has_z, states, Gr, Ar, sum_A, B,
                    B_step, constant_B, by_B, by_B_step, C, C_step, constant_C, by_C, by_C_step, resets, reset_step,
                    has_resets,
                )  # fmt: skip
    for s in range(some, d_state):
        for v in range(count):
            _of_kind(
                False, False, v, s, notes, left, length, lanes, d_state, even, has_z, states, Gr, Ar, sum_A, B, B_step,
                constant_B, by_B, by_B_step, C, C_step, constant_C, by_C, by_C_step, resets, reset_step, has_resets,
            )  # fmt: skip


@merged
def _of_kind(
    few: bool, two: bool, v: int, s: int, notes: Any, left: Any, length: int, lanes: int, d_state: int, even: Any,
    has_z: bool, states: Any, Gr: Any, Ar: Any, sum_A: Any, B: Any, B_step: int, constant_B: bool, by_B: Any,
    by_B_step: int, C: Any, C_step: int, constant_C: bool, by_C: Any, by_C_step: int, resets: Any, reset_step: int,
    has_resets: bool,
) -> None:  # fmt: skip
    """`through_tile` of the states from `s` on of vector `v`, and of the next one: by powers where rates are even."""
    now, j, apart = shifted(notes, v * lanes), (v * d_state + s) * lanes, d_state * lanes
    h, G, a, to_A = shifted(states, j), shifted(Gr, j), shifted(Ar, j), shifted(sum_A, j)
    b, to_B = shifted(B, j if constant_B else s), shifted(by_B, j if constant_B else s * lanes)
    c, to_C = shifted(C, j if constant_C else s), shifted(by_C, j if constant_C else s * lanes)
    if even[v * lanes] != 0:
        _there_and_back(
            now, left, length, lanes, few, two, apart, True, has_z, h, G, a, to_A, b, B_step, constant_B, to_B,
            by_B_step, c, C_step, constant_C, to_C, by_C_step, resets, reset_step, has_resets,
        )  # fmt: skip
    else:
        _there_and_back(
            now, left, length, lanes, few, two, apart, False, has_z, h, G, a, to_A, b, B_step, constant_B, to_B,
            by_B_step, c, C_step, constant_C, to_C, by_C_step, resets, reset_step, has_resets,
        )  # fmt: skip


@merged
def _there_and_back(
    notes: Any, left: Any, length: int, lanes: int, few: bool, two: bool, apart: int, is_even: bool, has_z: bool,
    states: Any, Gr: Any, Ar: Any, sum_A: Any, B: Any, B_step: int, constant_B: bool, by_B: Any, by_B_step: int, C: Any,
    C_step: int, constant_C: bool, by_C: Any, by_C_step: int, resets: Any, reset_step: int, has_resets: bool,
) -> None:  # fmt: skip
    """`through_tile` of a few states, or of one, of one or `two` vectors, whose matrices lie `apart`.

    Pointers are to what belongs to the first of the states.
    """
    to, more = (apart, lanes) if two else (0, 0)  # where the second vector lies in matrices, and in notes
    none = (zeros(left), zeros(left), zeros(left), zeros(left))
    a, a_to = _loaded(Ar, 0, lanes, few), _loaded(Ar, to, lanes, few)
    h, h_to = _loaded(states, 0, lanes, few), _loaded(states, to, lanes, few)
    for i in range(length):
        if has_resets and resets[i * reset_step] != 0:
            h, h_to = none, none
        now, note, of_B, of_C = shifted(left, 2 * i * LEFT * lanes), noted(notes, i, 0, lanes), i * B_step, i * C_step
        h = _there(h, a, note, now, _map(B, of_B, 0, lanes, few, constant_B), lanes, few, is_even)
        to_C = _times(load(note, G * 2 * lanes), h)
        if has_z:
            _add_out(note, h, _map(C, of_C, 0, lanes, few, constant_C), lanes, few)
        if two:
            note, now = shifted(note, more), shifted(now, LEFT * lanes)
            h_to = _there(h_to, a_to, note, now, _map(B, of_B, to, lanes, few, constant_B), lanes, few, is_even)
            if has_z:
                _add_out(note, h_to, _map(C, of_C, to, lanes, few, constant_C), lanes, few)
            to_C_to = _times(load(note, G * 2 * lanes), h_to)
            if constant_C:
                _add(by_C, to, to_C_to, lanes, few)
            else:
                to_C = _plus(to_C, to_C_to)
        _add(by_C, i * by_C_step, to_C, lanes, few)

    w, w_to = _loaded(Gr, 0, lanes, few), _loaded(Gr, to, lanes, few)
    by_A, by_A_to = none, none
    for i in range(length - 1, -1, -1):
        now, note, of_B, of_C = shifted(left, 2 * i * LEFT * lanes), noted(notes, i, 0, lanes), i * B_step, i * C_step
        b, c = _map(B, of_B, 0, lanes, few, constant_B), _map(C, of_C, 0, lanes, few, constant_C)
        w, by_A, to_B = _back(w, by_A, a, note, now, b, c, lanes, few, is_even)
        if two:
            b, c = _map(B, of_B, to, lanes, few, constant_B), _map(C, of_C, to, lanes, few, constant_C)
            note, now = shifted(note, more), shifted(now, LEFT * lanes)
            w_to, by_A_to, to_B_to = _back(w_to, by_A_to, a_to, note, now, b, c, lanes, few, is_even)
            if constant_B:
                _add(by_B, to, to_B_to, lanes, few)
            else:
                to_B = _plus(to_B, to_B_to)
        _add(by_B, i * by_B_step, to_B, lanes, few)
        if has_resets and resets[i * reset_step] != 0:  # no step before sees what comes after
            w, w_to = none, none
    _keep(Gr, 0, w, lanes, few)
    _add_up(sum_A, 0, by_A, lanes, few)
    if two:
        _keep(Gr, to, w_to, lanes, few)
        _add_up(sum_A, to, by_A_to, lanes, few)


@inline
def _there(h: Four, a: Four, note: Any, left: Any, b: Four, lanes: int, few: bool, is_even: bool) -> Four:
    """The states after a step from h on; `left` takes h, and decays that are no powers."""
    _keep(left, 0, h, lanes, few)
    step = load(note, STEP * 2 * lanes)
    drive = _times(step * load(note, INPUT * 2 * lanes), b)
    if is_even:
        f, _ = _powers(note, lanes, few)
        kept = load(note, KEPT * 2 * lanes)
        return (
            (f[0] * h[0] + drive[0]) + masked(h[0], kept),
            (f[1] * h[1] + drive[1]) + masked(h[1], kept),
            (f[2] * h[2] + drive[2]) + masked(h[2], kept),
            (f[3] * h[3] + drive[3]) + masked(h[3], kept),
        )
    p0, p1, p2, p3, r0, r1, r2, r3 = scaled_exp2((step * a[0], step * a[1], step * a[2], step * a[3]))
    _keep(left, AT_ONCE * lanes, (p0, p1, p2, p3), lanes, few)
    _keep(left, 2 * AT_ONCE * lanes, (r0, r1, r2, r3), lanes, few)
    k0, k1, k2, k3 = h[0] * p0, h[1] * p1, h[2] * p2, h[3] * p3
    return (
        k0 + (r0 * k0 + drive[0]), k1 + (r1 * k1 + drive[1]), k2 + (r2 * k2 + drive[2]), k3 + (r3 * k3 + drive[3]),
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
    to_B = _times(step * load(note, INPUT * 2 * lanes), (G0, G1, G2, G3))
    if is_even:
        f, following = _powers(note, lanes, few)
        kept = load(note, KEPT * 2 * lanes)
        store(note, FACTOR * 2 * lanes, following)
        G0, G1 = f[0] * G0 + masked(G0, kept), f[1] * G1 + masked(G1, kept)
        G2, G3 = f[2] * G2 + masked(G2, kept), f[3] * G3 + masked(G3, kept)
    else:
        p, r = _loaded(left, AT_ONCE * lanes, lanes, few), _loaded(left, 2 * AT_ONCE * lanes, lanes, few)
        G0, G1, G2, G3 = G0 * p[0], G1 * p[1], G2 * p[2], G3 * p[3]
        G0, G1, G2, G3 = r[0] * G0 + G0, r[1] * G1 + G1, r[2] * G2 + G2, r[3] * G3 + G3
    h = _loaded(left, 0, lanes, few)
    X0, X1, X2, X3 = G0 * h[0], G1 * h[1], G2 * h[2], G3 * h[3]
    along_A = along_A + a[0] * X0
    if few:
        along_A = along_A + a[1] * X1 + a[2] * X2 + a[3] * X3
    store(note, ALONG_A * 2 * lanes, along_A)
    return (G0, G1, G2, G3), _plus(by_A, _times(step, (X0, X1, X2, X3))), to_B


@inline
def _powers(note: Any, lanes: int, few: bool) -> tuple[Four, Any]:
    """(what decays follow from for the states, for the one after them): see `start_powers`."""
    ratio, more = load(note, RATIO * 2 * lanes), load(note, MORE * 2 * lanes)
    f0 = load(note, FACTOR * 2 * lanes)
    f1 = f0 * ratio + more
    f2 = f1 * ratio + more
    f3 = f2 * ratio + more
    return (f0, f1, f2, f3), f3 * ratio + more if few else f1


@inline
def _add_out(note: Any, h: Four, c: Four, lanes: int, few: bool) -> None:
    out = load(note, OUT * 2 * lanes) + h[0] * c[0]
    if few:
        out = out + h[1] * c[1] + h[2] * c[2] + h[3] * c[3]
    store(note, OUT * 2 * lanes, out)


@inline
def _times(x: Any, y: Four) -> Four:
    return x * y[0], x * y[1], x * y[2], x * y[3]


@inline
def _plus(x: Four, y: Four) -> Four:
    return x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3]


@inline
def _loaded(memory: Any, at: int, lanes: int, few: bool) -> Four:
    """Four vectors, or the same one four times: what is computed of it is computed once."""
    j, k, m = (lanes, 2 * lanes, 3 * lanes) if few else (0, 0, 0)
    return load(memory, at), load(memory, at + j), load(memory, at + k), load(memory, at + m)


@inline
def _map(maps: Any, now: int, at: int, lanes: int, few: bool, constant: bool) -> Four:
    """What B or C has for the states: other vectors for other channels, if it is constant."""
    if constant:
        return _loaded(maps, at, lanes, few)
    j, k, m = (1, 2, 3) if few else (0, 0, 0)
    return spread(maps, now), spread(maps, now + j), spread(maps, now + k), spread(maps, now + m)


@inline
def _keep(memory: Any, at: int, x: Four, lanes: int, few: bool) -> None:
    store(memory, at, x[0])
    if few:
        store(memory, at + lanes, x[1])
        store(memory, at + 2 * lanes, x[2])
        store(memory, at + 3 * lanes, x[3])


@inline
def _add(sums: Any, at: int, x: Four, lanes: int, few: bool) -> None:
    """`_add_up`, where a product and its sum may fuse."""
    _keep(sums, at, _plus(_loaded(sums, at, lanes, few), x), lanes, few)


@inline
def _add_up(sums: Any, at: int, x: Four, lanes: int, few: bool) -> None:
    add_up(sums, at, x[0])
    if few:
        add_up(sums, at + lanes, x[1])
        add_up(sums, at + 2 * lanes, x[2])
        add_up(sums, at + 3 * lanes, x[3])


@inline
def write_step(
    notes: Any, i: int, lanes: int, row: int, count: int, edge: Any, skip: Any, has_z: bool, softplus: bool,
    grad_u: Any, grad_delta: Any, grad_z: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Write the gradients by the inputs of step i of one vector; (∂Δ, what D gets)."""
    step, x = load(noted(notes, i, STEP, lanes), 0), load(noted(notes, i, INPUT, lanes), 0)
    g, along_B = load(noted(notes, i, G, lanes), 0), load(noted(notes, i, ALONG_B, lanes), 0)
    store_part(grad_u, row, g * skip + step * along_B, count, lanes, edge)
    to_delta = load(noted(notes, i, ALONG_A, lanes), 0) * LN_2 + x * along_B
    if softplus:
        to_delta = to_delta * load(noted(notes, i, SLOPE, lanes), 0)
    store_part(grad_delta, row, to_delta, count, lanes, edge)
    if has_z:
        grad = load(noted(notes, i, GATE_SLOPE, lanes), 0) * load(noted(notes, i, OUT, lanes), 0)
        store_part(grad_z, row, grad, count, lanes, edge)
    return to_delta, g * x
