"""Steps on a block of causal attention through features, for `step`: weights of its pairs, and sums of the state after.

Rows and keys are those of one transposed block.
"""

from typing import Any

from subquad_numpy.codegen import at_least, at_most, inline, load, spread, store, where_negative, zeros
from subquad_numpy.codegen.turn import maxima, totals
from subquad_numpy.codegen.vector_math import LEAST, ZERO, exp_negative
from subquad_numpy.features.phi import times_value


@inline
def append_squares(keys: Any, d: int, half_scale: Any, block: Any) -> None:
    """Write the last number of each key, −h|k|², where h is `half_scale`."""
    # without h the square is not used: |k|² overflows long before k does, and 0 · ∞ is NaN
    for j in range(0, block.rows, block.lanes):
        square = zeros(keys)
        if half_scale != 0:
            for p in range(d):
                square = square + load(keys, p * block.rows + j) * load(keys, p * block.rows + j)
            square = square * -half_scale
        store(keys, d * block.rows + j, square)


@inline
def scale_rows(
    top: Any, empty: bool, lowest: Any, zero: Any, half: Any, one: Any,
    peaks: Any, pivots: Any, divisors: Any, grown: Any, faded: Any, block: Any,
) -> None:  # fmt: skip
    """Write the largest a[j] that each row sees, what its weights are relative to, R, exp(R − pivot) and exp(−R)."""
    most_seen = lowest
    for r in range(block.rows):
        most_seen = max(most_seen, top[r])
        peaks[r] = most_seen if most_seen != lowest else zero
    for r in range(0, block.rows, block.lanes):
        pivot = load(peaks, r)
        divisor = pivot
        if not empty:
            divisor, pivot = at_least(pivot * half, ZERO(pivot)), at_least(pivot, ZERO(pivot))
        store(pivots, r, pivot)
        store(divisors, r, divisor)
        store(grown, r, (zeros(top) + one) / exp_negative(divisor - pivot))
        store(faded, r, exp_negative(zeros(top) if empty else -divisor))


@inline
def weigh(
    weights: Any, count: int, top: Any, later: Any, pivots: Any, grown: Any, far: Any, huge: Any, least: Any, sums: Any,
    block: Any,
) -> None:  # fmt: skip
    """Scale the products of features to weights; lanes of each row whose maximum is −its least product, and its sum."""
    for r in range(count):
        pivot, growth = spread(pivots, r), spread(grown, r)
        smallest, weight = zeros(top) + huge, zeros(top)
        for j in range(0, block.rows, block.lanes):
            a = load(top, j) + load(later, block.rows - 1 - r + j)
            w = load(weights, r * block.rows + j)
            smallest = at_most(where_negative(a + far, smallest, w), smallest)
            w = w * (exp_negative(a - pivot) * growth)
            store(weights, r * block.rows + j, w)
            weight = weight + w
        store(least, r * block.lanes, -smallest)  # lanes of as many rows as a vector has join at once
        store(sums, r * block.lanes, weight)


@inline
def shift_on(
    x: Any, m: int, stride: int, lowest: Any, shift: Any, opposite: Any, fade: Any, free: Any, block: Any
) -> None:
    """Write the shift after the block, the start of its exponents, and the factor of the sums before it."""
    for i in range(m):
        most = load(x, i * block.rows)
        for j in range(block.lanes, block.rows, block.lanes):
            most = at_least(load(x, i * block.rows + j), most)
        store(free, i * block.lanes, most)  # lanes of as many features as a vector has join at once
    for i in range(m, stride):
        store(free, i * block.lanes, zeros(x) + lowest)
    for i in range(0, stride, block.lanes):
        old = load(shift, i)
        new = at_least(maxima(free, i * block.lanes), old)
        start = where_negative(new - LEAST(new), ZERO(new), new)
        store(shift, i, new)
        store(opposite, i, start)
        store(fade, i, exp_negative(old - start))


@inline
def add_features(
    x: Any, above: Any, m: int, stride: int, phi: int, starts: Any, fade: Any, k_sum: Any, free: Any, block: Any
) -> None:
    """Turn x into the features of the keys, over exp(start), and add their sums to the faded ones."""
    for i in range(m):
        start, along = spread(starts, i), zeros(x)
        for j in range(0, block.rows, block.lanes):
            place = i * block.rows + j
            e = times_value(exp_negative(load(x, place) - start), load(above, place), phi)
            store(x, place, e)
            along = along + e
        store(free, i * block.lanes, along)
    for i in range(m, stride):
        store(free, i * block.lanes, zeros(x))
    for i in range(0, stride, block.lanes):
        store(k_sum, i, load(k_sum, i) * load(fade, i) + totals(free, i * block.lanes))
