"""Sums of the values that rows see, tile by tile of keys, and the means of these: what attention is without logits.

The sums run over the keys of one tile at a time, as differences of sums from the first key of the tile on, so that
their rounding does not grow with the keys before.
"""

from typing import Any

from subquad_numpy.block_attention.tiles import at, seen_by_all, seen_keys
from subquad_numpy.codegen import apart, load, pointer, store, zeros
from subquad_numpy.codegen.copies import load_part, store_part


@apart
def add_visible(
    f: Any, b: Any, first: int, many: int, is_plain: bool, limits: Any, reach: Any, count: int, lanes: int, byte: Any,
    upto: Any, shown: Any, sums: Any, counts: Any, edge: Any,
) -> None:  # fmt: skip
    """Add to `sums` (rows + vectors of rows, whole vectors) and `counts` what rows see of the keys of a tile.

    `b` are the values of the keys first … first + many − 1, of which the mask shows all if `is_plain`. What all rows of
    a vector of rows see goes to one row of `sums` behind those of the rows. `upto` (keys + 1, whole vectors) and
    `shown` (keys + 1) take sums of the values, and how many keys the mask shows, before each key.
    """
    d_v, mask = f.d_v, pointer(f.mask, byte)
    wide = -(-d_v // lanes) * lanes
    last = wide - lanes
    parts = 0 if is_plain else 1  # vectors of rows that see a part of the keys
    for i in range(0, count, lanes):
        _, high = seen_keys(f, reach, i, lanes, first, many)
        parts += 1 if high > 0 and seen_by_all(reach, i, lanes, first, many) < many else 0
    shown[0] = 0
    for t in range(many):
        shown[t + 1] = shown[t] + (1 if is_plain or mask[first + t] != 0 else 0)
    for p in range(0, wide, 4 * lanes):  # a sum waits for the one before: four vectors side by side, the last ones anew
        second, third, fourth = min(p + lanes, last), min(p + 2 * lanes, last), min(p + 3 * lanes, last)
        one, two, three, four = zeros(sums), zeros(sums), zeros(sums), zeros(sums)
        for t in range(0 if parts == 0 else many):
            here = t * wide
            store(upto, here + p, one)
            store(upto, here + second, two)
            store(upto, here + third, three)
            store(upto, here + fourth, four)
            weight = shown[t + 1] - shown[t]
            one = one + load_part(b.data, t * b.row + p, d_v - p, lanes, edge) * weight
            two = two + load_part(b.data, t * b.row + second, d_v - second, lanes, edge) * weight
            three = three + load_part(b.data, t * b.row + third, d_v - third, lanes, edge) * weight
            four = four + load_part(b.data, t * b.row + fourth, d_v - fourth, lanes, edge) * weight
        for t in range(many if parts == 0 else 0):
            one = one + load_part(b.data, t * b.row + p, d_v - p, lanes, edge)
            two = two + load_part(b.data, t * b.row + second, d_v - second, lanes, edge)
            three = three + load_part(b.data, t * b.row + third, d_v - third, lanes, edge)
            four = four + load_part(b.data, t * b.row + fourth, d_v - fourth, lanes, edge)
        store(upto, many * wide + p, one)
        store(upto, many * wide + second, two)
        store(upto, many * wide + third, three)
        store(upto, many * wide + fourth, four)
    for i in range(0, count, lanes):
        if seen_by_all(reach, i, lanes, first, many) == many:
            common = f.rows + i // lanes
            counts[common] += shown[many]
            for p in range(0, wide, lanes):
                store(sums, common * wide + p, load(sums, common * wide + p) + load(upto, many * wide + p))
            continue
        for c in range(i, min(i + lanes, count)):
            low = min(max(int(-limits.before[c]) - first, 0), many)
            high = min(max(int(limits.stop[c]) - first, 0), many)
            if low < high:
                counts[c] += shown[high] - shown[low]
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
        common = f.rows + c // lanes
        share = 1 / max(counts[c] + counts[common], 1)
        for p in range(0, f.d_v, lanes):
            value = (load(sums, c * wide + p) + load(sums, common * wide + p)) * share + (zeros(sums) + poison[c])
            store_part(mean, mine + p, value, f.d_v - p, lanes, edge)
