"""What both kernels of the delta rule read: sizes, arrays, and the decays of a step as factors of a recurrence."""

from typing import Any

from subquad_numpy.codegen import (
    absolute,
    at_least,
    inline,
    largest,
    load,
    replace_where_zero,
    shifted,
    spread,
    store,
    zeros,
)
from subquad_numpy.codegen.copies import load_part
from subquad_numpy.codegen.vector_math import LOG2_E, ONE, ZERO, split_exp2
from subquad_numpy.runtime.arguments import Fields

SIZES = ("n", "heads", "d", "d_v", "reverse")
INPUTS = ("q", "k", "v", "g", "beta", "a", "b", "initial_state", "resets")  # contiguous arrays
HEAD: Fields = dict.fromkeys(SIZES) | dict.fromkeys(("numbers", *INPUTS), 0)
"""The fields that both kernels read; `numbers` holds the scale."""

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
    """(factor, keep, distance) of 2^x: factor + keep; keep is 1 where the factor is 2^x − 1 with all its digits.

    `distance` is 0 or 1 where 2^x − 1 loses no digit to 2^x: from about 0.35 to 2.8.
    """
    factor, whole = split_exp2(x)
    return factor, replace_where_zero(whole, ZERO(x), ONE(x)), absolute(whole)


@inline
def load_gate(g: Any, index: int) -> Any:
    """(factor, w, is near 1) of one decay for all channels, both in every lane."""
    factor, keep, distance = split_decay(spread(g, index) * LOG2_E)
    near = largest(distance) < 1.5
    w = factor + keep
    if near:
        factor = factor - (ONE(factor) - keep)
    return factor, w, near


@inline
def load_gates(g: Any, index: int, k: Any, row: int, d: int, lanes: int, factors: Any, edge: Any) -> bool:
    """Write the factors of d channels, their `keep` and w ∘ k to `factors`, each padded; whether all are near 1."""
    size = -(-d // lanes) * lanes
    keeps, decayed_k = shifted(factors, size), shifted(factors, 2 * size)
    farthest = zeros(edge)
    for i in range(0, d, lanes):
        factor, keep, distance = split_decay(load_part(g, index + i, d - i, lanes, edge) * LOG2_E)
        store(factors, i, factor)
        store(keeps, i, keep)
        store(decayed_k, i, (factor + keep) * load_part(k, row + i, d - i, lanes, edge))
        farthest = at_least(farthest, distance)
    near = largest(farthest) < 1.5
    if near:
        for i in range(0, d, lanes):
            keep = load(keeps, i)
            store(factors, i, load(factors, i) - (ONE(keep) - keep))
    return near
