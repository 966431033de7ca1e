"""Sums of the values that rows see, tile by tile of keys, and the means of these: what attention is without logits.

The sums run over the keys of one tile at a time, as differences of sums from the first key of the tile on, so that
their rounding does not grow with the keys before.
"""

from typing import Any

from subquad_numpy.block_attention.tiles import at
from subquad_numpy.codegen import apart, load, pointer, store, zeros
from subquad_numpy.codegen.copies import load_part, store_part


@apart
def add_visible(
    f: Any, b: Any, first: int, many: int, is_whole: bool, limits: Any, count: int, lanes: int, byte: Any, upto: Any,
    shown: Any, sums: Any, counts: Any, edge: Any,
) -> None:  # fmt: skip
    """Add to `sums` (rows + 1, whole vectors) and `counts` what rows see of the keys first … first + many − 1.

    `b` are the values of these keys. If all rows see all of them (`is_whole`), it goes to the row behind the last one.
    `upto` (keys + 1, whole vectors) and `shown` (keys + 1) take sums of the values, and how many keys the mask shows,
    before each key.
    """
    d_v, mask = f.d_v, pointer(f.mask, byte)
    wide = -(-d_v // lanes) * lanes
    if is_whole:
        counts[count] += many
        for p in range(0, d_v, lanes):
            one, other = zeros(sums), zeros(sums)  # a sum waits for the one before: two side by side
            for t in range(0, many - 1, 2):
                one = one + load_part(b.data, t * b.row + p, d_v - p, lanes, edge)
                other = other + load_part(b.data, (t + 1) * b.row + p, d_v - p, lanes, edge)
            if many % 2 != 0:
                one = one + load_part(b.data, (many - 1) * b.row + p, d_v - p, lanes, edge)
            store(sums, count * wide + p, load(sums, count * wide + p) + (one + other))
        return
    shown[0] = 0
    for t in range(many if f.mask != 0 else 0):
        shown[t + 1] = shown[t] + (1 if mask[first + t] != 0 else 0)
    for p in range(0, d_v, 2 * lanes):
        after = min(p + lanes, wide - lanes)  # the last vector of an odd number is added up twice
        total, other = zeros(sums), zeros(sums)
        store(upto, p, total)
        store(upto, after, other)
        for t in range(many):
            weight = shown[t + 1] - shown[t] if f.mask != 0 else 1.0
            total = total + load_part(b.data, t * b.row + p, d_v - p, lanes, edge) * weight
            other = other + load_part(b.data, t * b.row + after, d_v - after, lanes, edge) * weight
            store(upto, (t + 1) * wide + p, total)
            store(upto, (t + 1) * wide + after, other)
    for c in range(count):
        low = min(max(int(-limits.before[c]) - first, 0), many)
        high = min(max(int(limits.stop[c]) - first, 0), many)
        if low < high:
            counts[c] += shown[high] - shown[low] if f.mask != 0 else high - low
            for p in range(0, wide, lanes):
                more = load(upto, high * wide + p) - load(upto, low * wide + p)
                store(sums, c * wide + p, load(sums, c * wide + p) + more)


@apart
def write_means(
    f: Any, row: int, count: int, lanes: int, order: Any, sums: Any, counts: Any, poison: Any, mean: Any, edge: Any
) -> None:
    """Write the means of `count` rows from `row` on: 0 of no key, and NaN where a value that is seen or `poison` is."""
    wide = -(-f.d_v // lanes) * lanes
    for c in range(count):
        mine = at(order, f.order_q != 0, row + c) * f.d_v
        share = 1 / max(counts[c] + counts[count], 1)
        for p in range(0, f.d_v, lanes):
            value = (load(sums, c * wide + p) + load(sums, count * wide + p)) * share + (zeros(sums) + poison[c])
            store_part(mean, mine + p, value, f.d_v - p, lanes, edge)
