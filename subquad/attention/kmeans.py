"""Clusters of rows by k-means (Lloyd, 1982), at the cost of a few products of all rows with m centres.

    centres of a sample:    c_r ← mean of the sampled rows nearest to c_r,    `iterations` times
    clusters of all rows:   μ_r = mean of the visible rows nearest to c_r,    n_r = their number

The sample has one random row of each of 8 m strata of the visible rows, or all of them if they are fewer. The first
centres are means of consecutive segments of the sample; for keys, the ⌊m/2⌋ keys of the largest logits to the mean
query go before these and into the sample, because a key that most rows attend to must not vanish in a cluster of
others. A cluster without rows keeps its centre. Which row belongs to which cluster is constant for gradients: they flow
through the means.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

from subquad.attention.landmarks import count_visible, segment_means, strata_hold_a_row, uniform_rows
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch

SAMPLED = 8  # rows of the sample for each cluster
HEAVY = 2  # one of this many centres begins at a key that the mean query attends to most


class Clusters(NamedTuple):
    """m clusters of rows."""

    means: Array  # (..., m, d)
    valid: Array | None  # which of them are means of rows, (..., m); None: all
    counts: Array  # number of rows, (..., m, 1), 0 or more
    values: Array | None  # means of the values of their rows, (..., m, d_v); 0 for a cluster without rows


def find_clusters(
    xp: ModuleType,
    x: Array,
    mask: Array | None,
    m: int,
    *,
    iterations: int,
    seed: int,
    values: Array | None = None,
    toward: Array | None = None,
) -> Clusters:
    """The clusters of the rows of `x` (..., n, d) that the mask keeps, and the means of `values` (..., n, d_v) in them.

    With at most m visible rows, each of them is the mean of a cluster, in their order. Rows that are not finite belong
    to no cluster. `toward` (..., 1, d) is the mean query, times the scale.
    """
    if mask is None and backend_of(xp).holds(x.shape[-2] <= m):
        return Clusters(x, None, xp.ones_like(x[..., :1]), values)
    sample, sampled = sample_rows(xp, x, mask, SAMPLED * m, seed)
    single, valid = (None, None) if mask is None else segment_means(xp, sample, sampled, m)
    heavy = 0 if toward is None else m // HEAVY
    centres, _ = segment_means(xp, sample, sampled, m - heavy)
    if heavy:
        rows = largest_rows(xp, x, mask, toward, heavy)
        centres, sample = _before(xp, rows, centres), _before(xp, rows, sample)
        if sampled is not None:
            seen = xp.ones((*sampled.shape[:-1], heavy), dtype=sampled.dtype, device=place_of(sampled))
            sampled = xp.concat([seen, sampled], axis=-1)
    centres = xp.where(xp.isfinite(centres), centres, 0.0)
    for _ in range(iterations):
        total, count, _ = _assign(xp, centres, sample, sampled, None)
        centres = xp.where(count > 0, total / _at_least_one(xp, count), centres)
    total, counts, summed = _assign(xp, centres, x, mask, values)
    means = xp.where(counts > 0, total / _at_least_one(xp, counts), centres)
    of_values = None if summed is None else summed / _at_least_one(xp, counts)
    if mask is not None:
        few = count_visible(xp, mask)[..., None] <= m
        means = xp.where(few, single, means)
        counts = xp.where(few, xp.astype(valid, counts.dtype)[..., None], counts)
        if of_values is not None:
            of_values = xp.where(few, segment_means(xp, values, mask, m)[0], of_values)
    return Clusters(means, valid, counts, of_values)


def largest_rows(xp: ModuleType, x: Array, mask: Array | None, toward: Array, count: int) -> Array:
    """The rows (..., count, d) of `x` with the largest products with `toward` (..., 1, d), of those that are seen."""
    products = (x @ xp.matrix_transpose(toward))[..., 0]
    seen = xp.isfinite(products) if mask is None else mask & xp.isfinite(products)
    order = xp.argsort(xp.where(seen, products, -math.inf), axis=-1, descending=True, stable=True)
    index = order[..., :count]
    # rows of all items in one array, of which those of item i begin at i n
    n, items = x.shape[-2], math.prod(x.shape[:-2])
    first = xp.reshape(xp.arange(items, dtype=index.dtype, device=place_of(x)) * n, (*x.shape[:-2], 1))
    index = first + index
    rows = xp.take(xp.reshape(x, (items * n, x.shape[-1])), xp.reshape(index, (-1,)), axis=0)
    return xp.reshape(rows, (*index.shape, x.shape[-1]))


def _before(xp: ModuleType, first: Array, second: Array) -> Array:
    """The rows of both, in a common batch."""
    batch = broadcast_batch(first=first.shape[:-2], second=second.shape[:-2])
    return xp.concat([xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (first, second)], axis=-2)


def sample_rows(xp: ModuleType, x: Array, mask: Array | None, count: int, seed: int) -> tuple[Array, Array | None]:
    """(a random row from each of `count` strata, which of them hold a row or None: all); all rows if n ≤ count."""
    n, holds = x.shape[-2], backend_of(xp).holds
    if holds(n <= count):
        return x, mask
    rows, sampled = uniform_rows(xp, x, mask, count, seed)
    if mask is None and not holds(n > count):  # in a program for any length, strata may be empty
        sampled = strata_hold_a_row(xp, n, count, place_of(x))
    return rows, sampled


def _assign(
    xp: ModuleType, centres: Array, x: Array, mask: Array | None, values: Array | None
) -> tuple[Array, Array, Array | None]:
    """(sum (..., m, d), number (..., m, 1), sum of values (..., m, d_v)) of the rows nearest to each centre."""
    # distances are those of rows and centres relative to a point amidst them, where squares lose no digits
    origin = xp.mean(centres, axis=-2, keepdims=True)
    directions = xp.matrix_transpose(centres - origin)
    half = xp.sum(directions * directions, axis=-2, keepdims=True) / 2
    m = centres.shape[-2]

    def add(sums: tuple[Array, ...], rows: Array, keep: Array | None, values: Array | None) -> tuple[object, None]:
        seen = xp.all(xp.isfinite(rows), axis=-1, keepdims=True)
        seen = seen if keep is None else seen & keep
        rows = xp.where(seen, rows, 0.0)
        nearest = xp.argmax((rows - origin) @ directions - half, axis=-1, keepdims=True)
        names = xp.arange(m, dtype=nearest.dtype, device=place_of(rows))
        members = xp.matrix_transpose(xp.astype((nearest == names) & seen, rows.dtype))
        added = [sums[0] + members @ rows, sums[1] + xp.sum(members, axis=-1, keepdims=True)]
        if values is not None:
            added.append(sums[2] + members @ xp.where(seen, values, 0.0))
        return tuple(added), None

    batch = broadcast_batch(centres=centres.shape[:-2], x=x.shape[:-2], mask=None if mask is None else mask.shape[:-1])
    shapes = [(*batch, m, x.shape[-1]), (*batch, m, 1)]
    if values is not None:
        shapes.append((*broadcast_batch(rows=batch, values=values.shape[:-2]), m, values.shape[-1]))
    sums = tuple(xp.zeros(shape, dtype=x.dtype, device=place_of(x)) for shape in shapes)
    size = rows_per_block(math.prod(batch) * m * backend_of(xp).items_behind(x, mask, values))
    keep = None if mask is None else mask[..., None]
    sums, _ = fold_blocks(add, sums, [x, keep, values], size, xp=xp)
    return sums[0], sums[1], sums[2] if values is not None else None


def _at_least_one(xp: ModuleType, count: Array) -> Array:
    return xp.where(count == 0, 1.0, count)
