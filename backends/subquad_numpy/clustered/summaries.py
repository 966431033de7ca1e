"""Rows of clusters side by side, and how far they spread: the kernels `cluster_members` and `cluster_spread`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from subquad.kernels.cluster_summaries import SPREAD_STEPS
from subquad_numpy.clustered.tree import dot
from subquad_numpy.codegen import cut, inline, load, pointer, room, shifted, spread, store, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.matmul import padded
from subquad_numpy.codegen.stored import pad_rows
from subquad_numpy.codegen.vector_math import bounded
from subquad_numpy.runtime.arguments import Fields, fields
from subquad_numpy.runtime.stored import AS_COMPUTED

CLUSTERS = 32  # of a task
# rows, numbers of a row, clusters, places of a cluster, tasks of an item, whether members are columns, bands, how rows
# are stored
SIZES: Fields = dict.fromkeys(("n", "d", "clusters", "size", "tasks", "turned", "bands", "stored"))
ARRAYS: Fields = {"x": 2, "order": 1, "counts": 1}
MEMBERS_RECORD = fields(SIZES, ARRAYS, {"members": 2, "means": 2})
SPREAD_RECORD = fields(SIZES, ARRAYS, {"seen": 2, "sight": 2, "spread": 2})


@cache
def cluster_members_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the members and the means of clusters; a task is some clusters of an item."""
    lanes, kind, zero = element(dtype)
    word = np.int32(0)

    @compiled(f"cluster members {dtype}", MEMBERS_RECORD)
    def members(first: int, last: int, records: Any) -> int:
        f = records[0]
        d, size = f.d, f.size
        wide = padded(d, lanes)
        sizes = (size * wide, wide)
        buffer = np.empty(room(sizes), kind)
        rows, mean = cut(buffer, sizes)
        for task in range(first, last):
            f = records[task // f.tasks]
            x, order, counts = pointer(f.x, zero), pointer(f.order, word), pointer(f.counts, word)
            begin = task % f.tasks * CLUSTERS
            for c in range(begin, min(begin + CLUSTERS, f.clusters)):
                out, of_mean = shifted(pointer(f.members, zero), c * size * d), shifted(pointer(f.means, zero), c * d)
                many = min(max(counts[c], 0), size)
                read(x, f.stored, shifted(order, c * size), many, d, wide, lanes, rows, mean)
                for p in range(d):
                    of_mean[p] = mean[p]
                if f.turned != 0:
                    for p in range(d):
                        for s in range(size):
                            out[p * size + s] = rows[s * wide + p] if s < many else 0
                else:
                    for s in range(size):
                        for p in range(d):
                            out[s * d + p] = rows[s * wide + p] if s < many else 0
        return DONE

    return members


@cache
def cluster_spread_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the spread of clusters; a task is some clusters of an item."""
    lanes, kind, zero = element(dtype)
    word = np.int32(0)

    @compiled(f"cluster spread {dtype}", SPREAD_RECORD)
    def spread_of(first: int, last: int, records: Any) -> int:
        f = records[0]
        d, size, bands = f.d, f.size, f.bands
        wide = padded(d, lanes)
        sizes = (size * wide, size * wide, wide, wide, wide, wide, wide, size)
        buffer = np.empty(room(sizes), kind)
        far, seen, mean, g, u, squared, variance, along = cut(buffer, sizes)
        width = -(-d // bands) if bands > 0 else d
        for task in range(first, last):
            f = records[task // f.tasks]
            x, as_seen, sight = pointer(f.x, zero), pointer(f.seen, zero), pointer(f.sight, zero)
            order, counts, made = pointer(f.order, word), pointer(f.counts, word), pointer(f.spread, zero)
            begin = task % f.tasks * CLUSTERS
            for c in range(begin, min(begin + CLUSTERS, f.clusters)):
                many, out = min(max(counts[c], 0), size), shifted(made, c * (d + bands))
                read(x, f.stored, shifted(order, c * size), many, d, wide, lanes, far, mean)
                center(far, many, wide, lanes, mean)
                share = 1 / max(many, 1)
                for p in range(0, wide, lanes):
                    squares = zeros(far)
                    for s in range(many):
                        squares = squares + load(far, s * wide + p) * load(far, s * wide + p)
                    store(variance, p, bounded(squares * share))
                if bands == 0:
                    for p in range(d):
                        out[p] = variance[p]
                    continue
                read(as_seen, AS_COMPUTED, shifted(order, c * size), many, d, wide, lanes, seen, mean)
                center(seen, many, wide, lanes, mean)
                turn_along(seen, many, wide, lanes, g, along)
                # Σ g / √(gᵀ Σ g), for along = far g
                total = 0.0
                for s in range(many):
                    total += along[s] * along[s]
                total *= share
                for p in range(0, wide, lanes):
                    store(u, p, zeros(u))
                if total != 0:
                    for s in range(many):
                        along[s] = along[s] * (share / total**0.5)
                    add_rows(far, along, many, wide, lanes, u)
                for p in range(d):
                    out[p] = u[p]
                for p in range(0, wide, lanes):
                    store(squared, p, bounded(load(u, p) * load(u, p)))
                for b in range(bands):
                    left, weight = 0.0, 0.0
                    for p in range(b * width, min((b + 1) * width, d)):
                        left += (variance[p] - squared[p]) * sight[c * d + p]
                        weight += sight[c * d + p]
                    out[d + b] = 0.0 if left < 0 else left / weight
        return DONE

    return spread_of


@inline
def read(x: Any, stored: int, order: Any, many: int, d: int, wide: int, lanes: int, rows: Any, mean: Any) -> None:
    """Copy the rows order[0], …, order[many − 1] of x, and their mean."""
    for s in range(many):
        pad_rows(x, stored, order[s] * d, 0, 1, d, lanes, shifted(rows, s * wide), wide)
    share = 1 / max(many, 1)
    for p in range(0, wide, lanes):
        along = zeros(rows)
        for s in range(many):
            along = along + load(rows, s * wide + p)
        store(mean, p, along * share)


@inline
def center(rows: Any, many: int, wide: int, lanes: int, mean: Any) -> None:
    """Subtract the mean from rows."""
    for s in range(many):
        for p in range(0, wide, lanes):
            store(rows, s * wide + p, load(rows, s * wide + p) - load(mean, p))


@inline
def turn_along(x: Any, many: int, wide: int, lanes: int, g: Any, along: Any) -> None:
    """The products `along` of rows with a direction g: the longest row, turned by power iteration. Rows are scaled."""
    largest = 0.0
    for i in range(many * wide):
        largest = max(largest, abs(x[i]))
    factor = 1 / largest if largest > 0 else 1.0
    best, far = -1.0, 0
    for s in range(many):
        for p in range(0, wide, lanes):
            store(x, s * wide + p, load(x, s * wide + p) * factor)
        length = dot(x, s * wide, shifted(x, s * wide), wide, lanes)
        if length > best:
            best, far = length, s
    for p in range(0, wide, lanes):
        store(g, p, load(x, far * wide + p) if many > 0 else zeros(x))
    for step in range(SPREAD_STEPS + 1):
        norm = dot(g, 0, g, wide, lanes) ** 0.5
        factor = 1 / norm if norm > 0 else 1.0
        for s in range(many):
            along[s] = dot(x, s * wide, g, wide, lanes) * factor
        if step < SPREAD_STEPS:
            for p in range(0, wide, lanes):
                store(g, p, zeros(g))
            add_rows(x, along, many, wide, lanes, g)


@inline
def add_rows(x: Any, weights: Any, many: int, wide: int, lanes: int, sums: Any) -> None:
    """Add the rows of x, times their weights."""
    for s in range(many):
        for p in range(0, wide, lanes):
            store(sums, p, load(sums, p) + spread(weights, s) * load(x, s * wide + p))
