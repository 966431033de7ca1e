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
from subquad_numpy.codegen.matmul import TILE_ROWS, Panels, multiply, padded, rows_at
from subquad_numpy.runtime.arguments import Fields

ROWS = 256  # rows of a task
TILE = 64  # clusters of a tile: their means stay in the first cache

# Sizes: rows, keys, numbers of a row and of a value, clusters, keys of a cluster, clusters that are opened by weight
# and always, places around a row whose keys count elsewhere, tasks of an item.
SIZES: Fields = dict.fromkeys(("n", "n_kv", "d", "d_v", "clusters", "size", "opened", "always", "reach", "tasks"))
ARRAYS: Fields = {
    "numbers": 1, "q": 2, "k": 2, "v": 2, "order": 1, "means": 2, "spread": 2, "mean_values": 2, "counts": 1, "stop": 1,
    "place": 1, "cluster_of": 1, "before_out": 2, "before_lse": 1,
}  # fmt: skip
"""Addresses; 0 where an array is not given. `numbers` holds the scale."""


@inline
def pack_queries(q: Any, first: int, count: int, d: int, panel: int, scale: Any, packed: Any, squares: Any) -> None:
    """Copy rows, times the scale, and SPREAD times their squares, into panels (d, panel); lanes without a row are 0."""
    for c in range(panel):
        for p in range(d):
            value = q[(first + c) * d + p] * scale if c < count else 0
            packed[p * panel + c] = value
            squares[p * panel + c] = value * value * SPREAD


@inline
def weigh(
    f: Any, row: int, count: int, most: int, panel: int, lanes: int, zero: Any, word: Any, packed: Any, squares: Any,
    logs: Any, stops: Any, left: Any, nothing: Any, own: Any, x: Any,
) -> None:  # fmt: skip
    """The weights w of the clusters 0 … most − 1 for a panel of rows, (clusters, panel); −∞ where a row sees none.

    `logs` has the logarithm of the number of keys of each cluster, `stops` the number of clusters that each row sees.
    """
    means, spread = pointer(f.means, zero), pointer(f.spread, zero)
    d, clusters = f.d, f.clusters
    for j in range(0, most, TILE):
        many = min(TILE, most - j)
        rows, target = padded(many, TILE_ROWS), rows_at(shifted(x, j * panel), panel)
        a = whole_tile(means, d, nothing, False, j, many, d, clusters, False, own)
        multiply(a, rows, Panels(packed, d), d, panel, lanes, rows_at(nothing, 0), target)
        a = whole_tile(spread, d, nothing, False, j, many, d, clusters, False, own)
        multiply(a, rows, Panels(squares, d), d, panel, lanes, target, target)
        for column in range(0, panel, lanes):
            limit = load(stops, column) - 0.5
            for t in range(many):
                cell = (j + t) * panel + column
                value = load(x, cell) + logs[j + t]
                store(x, cell, where_negative(limit - float(j + t), zeros(x) - INFINITY, value))
    if f.place != 0:
        leave_near(f, row, count, panel, word, left, x)


@inline
def leave_near(f: Any, row: int, count: int, panel: int, word: Any, left: Any, x: Any) -> None:
    """Take the keys near each row out of the numbers of keys of their clusters; `left` is 0 for each cluster."""
    place, cluster_of, counts = pointer(f.place, word), pointer(f.cluster_of, word), pointer(f.counts, word)
    for c in range(count):
        low, high = max(place[row + c] - f.reach, 0), min(place[row + c] + f.reach + 1, f.n_kv)
        for j in range(low, high):
            if cluster_of[j] >= 0:
                left[cluster_of[j]] += 1
        for j in range(low, high):
            own = cluster_of[j]
            if own >= 0 and left[own] > 0:
                rest, cell = counts[own] - left[own], own * panel + c
                x[cell] = x[cell] + math.log(rest / counts[own]) if rest > 0 else -INFINITY
                left[own] = 0
