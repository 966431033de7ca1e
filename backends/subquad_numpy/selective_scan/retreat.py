"""One step back of the gradient of the scan, for real states: the gradient G of the state, and what follows from it."""

from typing import Any

from subquad_numpy.codegen import add_up, inline, load, merged, processor, spread, store, zeros
from subquad_numpy.selective_scan.recurrence import decayed

# Vectors of channels that share what is read of B and C: their sums must stay in registers, of which AVX-512 has 32.
TOGETHER = 2 if processor.has("avx512f") else 1


@inline
def _one_back(before: Any, decays: Any, j: int, step: Any, g: Any, c: Any, Gr: Any, by_A: Any) -> tuple[Any, Any]:
    """(G, ∂x) of the vector of states at `j`, after which `Gr` has what the step before gets of G."""
    G = load(Gr, j) + g * c
    w = decayed(load(decays, j), G)
    X = w * load(before, j)
    store(Gr, j, w)
    add_up(by_A, j, step * X)
    return G, X


@merged
def retreat(
    before: Any, decays: Any, at: int, d_state: int, lanes: int, steps: Any, inputs: Any, gs: Any, Gr: Any, Ar: Any,
    B: Any, row_of_B: int, Br: Any, constant_B: bool, C: Any, row_of_C: int, Cr: Any, constant_C: bool, two: bool,
    by_A: Any, by_B: Any, along: Any,
) -> None:  # fmt: skip
    """Write G of the step before to `Gr`, and add to the gradients by A and B, for the channels of one or two vectors.

    `along` takes Σ_s A ∂x and Σ_s B G of the first vector, then of the second. `by_A` has the order of the states, as
    `by_B` where B is constant; else that has one vector for each state.
    """
    to = at + lanes if two else at
    step, step_to, g, g_to = load(steps, at), load(steps, to), load(gs, at), load(gs, to)
    drive, drive_to = step * load(inputs, at), step_to * load(inputs, to)
    along_A, along_A_to, along_B, along_B_to = zeros(gs), zeros(gs), zeros(gs), zeros(gs)
    for s in range(d_state):
        j, j_to = at * d_state + s * lanes, to * d_state + s * lanes
        b = load(Br, j) if constant_B else spread(B, row_of_B + s)
        c = load(Cr, j) if constant_C else spread(C, row_of_C + s)
        G, X = _one_back(before, decays, j, step, g, c, Gr, by_A)
        along_A = along_A + load(Ar, j) * X
        along_B = along_B + b * G
        to_B = drive * G
        if two:
            b_to = load(Br, j_to) if constant_B else b
            c_to = load(Cr, j_to) if constant_C else c
            G, X = _one_back(before, decays, j_to, step_to, g_to, c_to, Gr, by_A)
            along_A_to = along_A_to + load(Ar, j_to) * X
            along_B_to = along_B_to + b_to * G
            if constant_B:
                add_up(by_B, j_to, drive_to * G)
            else:
                to_B = to_B + drive_to * G
        add_up(by_B, j if constant_B else s * lanes, to_B)
    store(along, 0, along_A)
    store(along, lanes, along_B)
    store(along, 2 * lanes, along_A_to)
    store(along, 3 * lanes, along_B_to)
