"""Sums of the values that rows see, tile by tile of keys, and the means of these: what attention is without logits.

The sums run over the keys of one tile at a time, as differences of sums from the first key of the tile on, so that
their rounding does not grow with the keys before.
"""

from typing import Any

from subquad_numpy.block_attention.tiles import at, seen_by_all, seen_keys
from subquad_numpy.codegen import apart, inline, load, pointer, store, zeros
from subquad_numpy.codegen.copies import clear, load_part, store_part


@inline
def _place(key: Any, first: int, many: int) -> int:
    """The place of a key among `many` from `first` on, or the end that is next to it."""
    return min(max(int(key) - first, 0), many)


@apart
def sum_values(
    f: Any, b: Any, first: int, many: int, is_plain: bool, limits: Any, reach: Any, count: int, lanes: int, byte: Any,
    upto: Any, shown: Any, cuts: Any, edge: Any,
) -> None:  # fmt: skip
    """Sum up values `b` of the keys first … first + many − 1 of a tile, of which the mask shows all if `is_plain`.

    `cuts` (keys + 1) takes at which keys rows begin or end, and the end of the tile; `upto` (keys + 1, whole vectors)
    sums of the values before these keys, and `shown` (keys + 1) how many keys before each key the mask shows.
    """
    d_v, mask = f.d_v, pointer(f.mask, byte)
    wide = -(-d_v // lanes) * lanes
    last = wide - lanes
    clear(cuts, many)
    cuts[many] = 1
    for i in range(0, count, lanes):
        _, far = seen_keys(f, reach, i, lanes, first, many)
        if far > 0 and seen_by_all(reach, i, lanes, first, many) < many:
            for c in range(i, min(i + lanes, count)):
                cuts[_place(-limits.before[c], first, many)] = 1
                cuts[_place(limits.stop[c], first, many)] = 1
    shown[0] = 0
    for t in range(many):
        shown[t + 1] = shown[t] + (1 if is_plain or mask[first + t] != 0 else 0)
    for p in range(0, wide, 4 * lanes):  # a sum waits for the one before: four vectors side by side, the last ones anew
        second, third, fourth = min(p + lanes, last), min(p + 2 * lanes, last), min(p + 3 * lanes, last)
        one, two, three, four = zeros(upto), zeros(upto), zeros(upto), zeros(upto)
        begin = 0
        for end in range(many + 1):
            if cuts[end] != 0:
                for t in range(begin, end):
                    weight = shown[t + 1] - shown[t]
                    one = one + load_part(b.data, t * b.row + p, d_v - p, lanes, edge) * weight
                    two = two + load_part(b.data, t * b.row + second, d_v - second, lanes, edge) * weight
                    three = three + load_part(b.data, t * b.row + third, d_v - third, lanes, edge) * weight
                    four = four + load_part(b.data, t * b.row + fourth, d_v - fourth, lanes, edge) * weight
                store(upto, end * wide + p, one)
                store(upto, end * wide + second, two)
                store(upto, end * wide + third, three)
                store(upto, end * wide + fourth, four)
                begin = end


@apart
def add_visible(
    f: Any, first: int, many: int, limits: Any, reach: Any, count: int, lanes: int, upto: Any, shown: Any, sums: Any,
    counts: Any,
) -> None:  # fmt: skip
    """Add to `sums` (rows + vectors of rows, whole vectors) and `counts` what rows see of a tile, by `sum_values`.

    What all rows of a vector of rows see goes to one row of `sums` behind those of the rows.
    """
    wide = -(-f.d_v // lanes) * lanes
    for i in range(0, count, lanes):
        if seen_by_all(reach, i, lanes, first, many) == many:
            common = f.rows + i // lanes
            counts[common] += shown[many]
            for p in range(0, wide, lanes):
                store(sums, common * wide + p, load(sums, common * wide + p) + load(upto, many * wide + p))
            continue
        for c in range(i, min(i + lanes, count)):
            low, high = _place(-limits.before[c], first, many), _place(limits.stop[c], first, many)
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
