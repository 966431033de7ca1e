"""The decays w = exp(g) of a step, as factors of a recurrence that lose no digits of decays next to 1."""

from typing import Any

from subquad_numpy.codegen import (
    absolute,
    at_least,
    inline,
    largest,
    load,
    merged,
    replace_where_zero,
    shifted,
    store,
    zeros,
)
from subquad_numpy.codegen.copies import load_part
from subquad_numpy.codegen.stored import load_stored_part, number_at
from subquad_numpy.codegen.vector_math import LOG2_E, ONE, ZERO, split_exp2
from subquad_numpy.delta_scan.layout import BLOCK

# How a row s of the state decays: by nothing; by one number near 1, f s + s with f = w − 1; by one number, f s; by a
# number for each channel, all near 1, f s + s; by f s + keep s, where `keep` is 1 for channels whose f is w − 1,
# else 0.
NONE, HEAD_NEAR, HEAD_FAR, CHANNELS_NEAR, CHANNELS = range(5)


@inline
def decayed(mode: int, s: Any, factor: Any, keep: Any) -> Any:
    """A vector of the state, decayed: one multiplication and addition, fused, in all modes but the last."""
    if mode == NONE:
        return s
    if mode == HEAD_FAR:
        return factor * s
    if mode == CHANNELS:
        return factor * s + keep * s
    return factor * s + s


@inline
def split_decay(x: Any) -> Any:
    """(factor, keep, distance) of 2^x = factor + keep; keep is 1 where the factor is 2^x − 1 with all its digits.

    `distance` is 0 or 1 from 0.35 to 2.8, where 2^x − 1 has as many digits as 2^x has.
    """
    factor, whole = split_exp2(x)
    return factor, replace_where_zero(whole, ZERO(x), ONE(x)), absolute(whole)


@merged
def load_gate(g: Any, stored: int, index: int) -> Any:
    """(factor, w, mode) of one decay for all channels; the first two are in every lane."""
    factor, keep, distance = split_decay((zeros(g) + number_at(g, stored, index)) * LOG2_E)
    w = factor + keep
    mode = HEAD_FAR
    if largest(distance) < 1.5:
        mode = HEAD_NEAR
        factor = factor - (ONE(factor) - keep)
    return factor, w, mode


@inline
def load_gates_of_head(
    g: Any, stored: int, index: int, step: int, count: int, lanes: int, gates: Any, modes: Any
) -> None:
    """Write factor and mode of `count` steps, at most `BLOCK`, and w `BLOCK` numbers behind the factor.

    `gates` has room for 4 · `BLOCK` numbers.
    """
    w, near, distances = shifted(gates, BLOCK), shifted(gates, 2 * BLOCK), shifted(gates, 3 * BLOCK)
    for i in range(0, count, lanes):
        for lane in range(lanes):
            gates[i + lane] = number_at(g, stored, index + (i + lane) * step) if i + lane < count else 0
        factor, keep, distance = split_decay(load(gates, i) * LOG2_E)
        store(gates, i, factor)
        store(w, i, factor + keep)
        store(near, i, factor - (ONE(factor) - keep))
        store(distances, i, distance)
    for i in range(count):
        modes[i] = HEAD_FAR
        if distances[i] < 1.5:
            modes[i] = HEAD_NEAR
            gates[i] = near[i]


@merged
def load_gates(g: Any, stored: int, index: int, k: Any, d: int, lanes: int, gates: Any, edge: Any) -> int:
    """Write the factors of d channels, their `keep`, w ∘ k and w to `gates`, each padded; their mode. k is a row."""
    size = -(-d // lanes) * lanes
    keeps, decayed_k, decays = shifted(gates, size), shifted(gates, 2 * size), shifted(gates, 3 * size)
    farthest = zeros(edge)
    for i in range(0, d, lanes):
        factor, keep, distance = split_decay(load_stored_part(g, stored, index + i, d - i, lanes, edge) * LOG2_E)
        w = factor + keep
        store(gates, i, factor)
        store(keeps, i, keep)
        store(decayed_k, i, w * load_part(k, i, d - i, lanes, edge))
        store(decays, i, w)
        farthest = at_least(farthest, distance)
    if largest(farthest) < 1.5:
        for i in range(0, d, lanes):
            keep = load(keeps, i)
            store(gates, i, load(gates, i) - (ONE(keep) - keep))
        return CHANNELS_NEAR
    return CHANNELS
