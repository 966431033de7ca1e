"""What the kernels of clustered attention share: argument records, weights of clusters, and the clusters of largest w.

Weights of clusters lie transposed, clusters × rows, with one row of queries in each lane, as in block attention. Rows
come in panels, as many as a tile of a product has lanes. Keys of opened clusters are read row by row of queries, with
one key in each lane, for all rows of a task that opened the cluster one after the other, while it is in cache.
"""

from __future__ import annotations

import math
from typing import Any

from subquad.kernels.clustered_attention import SPREAD
from subquad_numpy.block_attention.tiles import INFINITY, whole_tile
from subquad_numpy.codegen import inline, load, pointer, shifted, store, where_negative, zeros
from subquad_numpy.codegen.matmul import TILE_ROWS, Panels, multiply, pack_up_to, padded, rows_at, turned
from subquad_numpy.codegen.vector_math import bounded
from subquad_numpy.runtime.arguments import Fields
from subquad_numpy.runtime.stored import AS_COMPUTED

ROWS = 256  # rows of a task
TILE = 64  # clusters of a tile: their means stay in the first cache

# Sizes: rows, keys, numbers of a row and of a value, bands of a row, clusters, keys of a cluster, clusters that are
# opened by weight and always, places around a row whose keys count elsewhere, groups, clusters of a group, groups that
# are expanded, tasks of an item, how queries and outputs are stored.
SIZES: Fields = dict.fromkeys(
    (
        "n", "n_kv", "d", "d_v", "bands", "clusters", "size", "opened", "always", "reach", "groups", "group",
        "expanded", "tasks", "stored",
    )
)  # fmt: skip
ARRAYS: Fields = {
    "numbers": 1, "q": 2, "k": 2, "v": 2, "order": 1, "means": 2, "spread": 2, "mean_values": 2, "counts": 1,
    "group_means": 2, "group_spread": 2, "group_values": 2, "stop": 1, "place": 1, "cluster_of": 1, "before_out": 2,
    "before_lse": 1,
}  # fmt: skip
"""Addresses; 0 where an array is not given. `numbers` holds the scale and the logarithm of the share."""


@inline
def pack_queries(
    q: Any, first: int, count: int, d: int, bands: int, panel: int, lanes: int, scale: Any, packed: Any, squares: Any
) -> None:
    """Copy rows, times the scale, into a panel (d, panel), and SPREAD times the sums of their squares over each band.

    Lanes without a row are 0.
    """
    pack_up_to(turned(rows_at(shifted(q, first * d), d)), d, count, panel, scale, lanes, Panels(packed, d))
    width = -(-d // bands) if bands > 0 else d
    for b in range(bands):
        for column in range(0, panel, lanes):
            along = zeros(q)
            for p in range(b * width, min((b + 1) * width, d)):
                value = load(packed, p * panel + column)
                along = along + value * value
            store(squares, b * panel + column, along * SPREAD)
    bound(squares, bands * panel, lanes)


@inline
def bound(x: Any, size: int, lanes: int) -> None:
    """`bounded` of numbers, in place; their number is a multiple of the lanes."""
    for i in range(0, size, lanes):
        store(x, i, bounded(load(x, i)))


@inline
def weigh(
    f: Any, is_group: bool, first: int, many: int, whole: int, panel: int, lanes: int, zero: Any, packed: Any,
    squares: Any, logs: Any, stops: Any, shut: Any, nothing: Any, own: Any, x: Any,
) -> None:  # fmt: skip
    """The weights w of `many` clusters, or groups, for a panel of rows, (many, panel); −∞ where a row sees none.

    `logs` has the logarithm of the number of keys of each cluster and then of each group, `stops` the number of
    clusters that each row sees, and `shut` −1 for rows that see one of the first `whole` groups and do not expand it.
    """
    means = pointer(f.group_means if is_group else f.means, zero)
    spread = pointer(f.group_spread if is_group else f.spread, zero)
    d, count, before = f.d, f.groups if is_group else f.clusters, f.clusters if is_group else 0
    rows, target, wide = padded(many, TILE_ROWS), rows_at(x, panel), d + f.bands
    a = whole_tile(spread, AS_COMPUTED, wide, nothing, False, first, many, wide, count, False, lanes, own)
    multiply(a, rows, Panels(packed, d), d, panel, lanes, rows_at(nothing, 0), target)
    for i in range(0, many * panel, lanes):
        along = load(x, i)
        store(x, i, along * along * SPREAD)
    of_bands = rows_at(shifted(a.data, d), a.row)
    multiply(of_bands, rows, Panels(squares, f.bands), f.bands, panel, lanes, target, target)
    bound(x, many * panel, lanes)
    a = whole_tile(means, AS_COMPUTED, d, nothing, False, first, many, d, count, False, lanes, own)
    multiply(a, rows, Panels(packed, d), d, panel, lanes, target, target)
    for t in range(many):
        at = last_cluster(f, is_group, first + t)
        mine = (at - f.always) // f.group
        hides = not is_group and at >= f.always and mine < whole
        for column in range(0, panel, lanes):
            hidden = zeros(x) - INFINITY
            value = load(x, t * panel + column) + logs[before + first + t]
            value = where_negative(load(stops, column) - (at + 0.5), hidden, value)
            if hides:
                value = where_negative(load(shut, mine * panel + column), hidden, value)
            store(x, t * panel + column, value)


@inline
def last_cluster(f: Any, is_group: bool, i: int) -> int:
    """The number of a cluster, or that of the last cluster of a group."""
    return f.always + (i + 1) * f.group - 1 if is_group else i


@inline
def leave_near(
    f: Any, is_group: bool, row: int, count: int, panel: int, word: Any, keys_of: Any, at_of: Any, left: Any, x: Any
) -> None:
    """Take the keys near each row out of the numbers of keys of their clusters, or groups; `left` is 0 for each.

    `at_of` has one more than the row of x for each cluster and then for each group, 0 for one that has none.
    """
    place, cluster_of = pointer(f.place, word), pointer(f.cluster_of, word)
    for c in range(count):
        low, high = max(place[row + c] - f.reach, 0), min(place[row + c] + f.reach + 1, f.n_kv)
        for j in range(low, high):
            own = entry_of(f, is_group, cluster_of[j])
            if own >= 0:
                left[own] += 1
        for j in range(low, high):
            own = entry_of(f, is_group, cluster_of[j])
            if own >= 0 and left[own] > 0:
                rest, cell = keys_of[own] - left[own], (at_of[own] - 1) * panel + c
                if cell >= 0:
                    x[cell] = x[cell] + math.log(rest / keys_of[own]) if rest > 0 else -INFINITY
                left[own] = 0


@inline
def entry_of(f: Any, is_group: bool, cluster: int) -> int:
    """The number of a cluster, or of its group behind those of all clusters; −1 for none."""
    if not is_group or cluster < f.always:
        return -1 if is_group else cluster
    own = (cluster - f.always) // f.group
    return f.clusters + own if own < f.groups else -1
