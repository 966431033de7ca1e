"""Clusters of rows by k-means (Lloyd, 1982), at the cost of a few products of all rows with m centres.

    centres of a sample:    c_r ← mean of the sampled rows nearest to c_r,    `iterations` times
    clusters of all rows:   μ_r = mean of the visible rows nearest to c_r,    n_r = their number

The sample has one random row of each of 8 m strata of the visible rows, or all of them if they are fewer. The first
centres are means of consecutive segments of the sample. For keys, the ⌊m/2⌋ keys of the largest logits to the mean
query are centres before these, and rows of the sample, if they have a large enough share of its attention: a key that
most rows attend to must not vanish in a cluster of others. A cluster without rows keeps its centre. Which row belongs
to which cluster is constant for gradients: they flow through the means.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

from subquad.attention.landmarks import count_visible, segment_means, strata_hold_a_row, uniform_rows
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.gather import gather
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.max_shift import divide_or_zero, rescale
from subquad.kernels.nearest import nearest, outputs

SAMPLED = 8  # rows of the sample for each cluster
HEAVY = 2  # one of this many centres begins at a key that the mean query attends to most
MOST = 0.4  # share of attention with which these are worth their centres, unless clusters are counted


class Clusters(NamedTuple):
    """m clusters of rows."""

    means: Array  # (..., m, d)
    valid: Array | None  # which of them are means of rows, (..., m); None: all
    counts: Array  # number of rows, (..., m, 1), 0 or more
    values: Array | None  # means of the values of their rows, (..., m, d_v); 0 for a cluster without rows
    spreads: Array | None = None  # variances of their rows in each direction, (..., m, d); None: 0
    slopes: Array | None = None  # mean of (row − its mean)(value − their mean)ᵀ over all rows, (..., d, d_v); None: 0


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
    share: float = 0.0,
) -> Clusters:
    """The clusters of the rows of `x` (..., n, d) that the mask keeps.

    With `values` (..., n, d_v) also the means of these in the clusters, and what rows and values vary by inside them.
    With at most m visible rows, each of them is the mean of a cluster, in their order. Rows that are not finite belong
    to no cluster. `toward` (..., 1, d) is the mean query, times the scale; the keys of its largest logits are first
    centres where they have more than `share` of its attention.
    """
    if mask is None and backend_of(xp).holds(x.shape[-2] <= m):
        return Clusters(x, None, xp.ones_like(x[..., :1]), values)
    sample, sampled = sample_rows(xp, x, mask, SAMPLED * m, seed)
    single, valid = (None, None) if mask is None else segment_means(xp, sample, sampled, m)
    heavy = 0 if toward is None else m // HEAVY
    if heavy:
        rows, found = largest_rows(xp, x, mask, toward, heavy)
        begins = found > share  # (..., 1)
        centres = _before(xp, rows, segment_means(xp, sample, sampled, m - heavy)[0])
        if share > 0:
            centres = xp.where(begins[..., None], centres, segment_means(xp, sample, sampled, m)[0])
        if share > 0 or sampled is not None:
            every = xp.ones(sample.shape[-2:-1], dtype=xp.bool, device=place_of(x)) if sampled is None else sampled
            sampled = _beside(xp, xp.broadcast_to(begins, (*begins.shape[:-1], rows.shape[-2])), every)
        sample = _before(xp, rows, sample)
    else:
        centres, _ = segment_means(xp, sample, sampled, m)
    centres = xp.where(xp.isfinite(centres), centres, 0.0)
    for _ in range(iterations):
        _, count, total = nearest(sample, centres, None, key_mask=sampled)
        centres = _means(xp, total, _column(xp, count, x.dtype), centres)
    if values is None:
        _, count, total = nearest(x, centres, None, key_mask=mask)
        counts = _column(xp, count, x.dtype)
        found = Clusters(_means(xp, total, counts, centres), valid, counts, None)
    else:
        found = _with_values(xp, x, centres, values, mask)
    if mask is None:
        return found
    few = count_visible(xp, mask)[..., None] <= m
    means = xp.where(few, single, found.means)
    counts = xp.where(few, xp.astype(valid, x.dtype)[..., None], found.counts)
    if values is None:
        return Clusters(means, valid, counts, None)
    of_values = xp.where(few, segment_means(xp, values, mask, m)[0], found.values)
    return Clusters(means, valid, counts, of_values, *(xp.where(few, 0.0, y) for y in (found.spreads, found.slopes)))


def _with_values(xp: ModuleType, x: Array, centres: Array, values: Array, mask: Array | None) -> Clusters:
    """The clusters of the rows nearest to the centres, with all fields but `valid`.

    Rows are taken relative to a point amidst them, where squares and products lose no digits.
    """
    origin = xp.expand_dims(backend_of(xp).constant(backend_of(xp).mean_rows(xp, centres)), axis=-2)
    d, d_v = x.shape[-1], values.shape[-1]
    _, like, of_rows, of_values = outputs(x, centres, values, key_mask=mask)
    batch, m = like.shape[:-1], like.shape[-1]

    def add(found: tuple[Array, ...], rows: Array, values: Array, keep: Array | None) -> tuple[object, None]:
        if keep is not None:  # what is hidden may be NaN, and its square meets a gradient of 0
            rows, values = xp.where(keep, rows, 0.0), xp.where(keep, values, 0.0)
        near = rows - origin
        batch = broadcast_batch(rows=near.shape[:-2], values=values.shape[:-2])
        both = [xp.broadcast_to(y, (*batch, *y.shape[-2:])) for y in (near * near, values)]
        index, count, total, summed = nearest(
            rows, centres, xp.concat(both, axis=-1), key_mask=None if keep is None else keep[..., 0]
        )
        seen = (index >= 0)[..., None]
        product = xp.matrix_transpose(xp.where(seen, near, 0.0)) @ xp.where(seen, values, 0.0)
        return tuple(old + new for old, new in zip(found, (count, total, summed, product), strict=True)), None

    shapes = of_rows.shape, (*batch, m, d + d_v), (*batch, d, d_v)
    zeros = [xp.zeros(like.shape, dtype=like.dtype, device=place_of(x))]
    zeros += [xp.zeros(shape, dtype=of_values.dtype, device=place_of(x)) for shape in shapes]
    size = rows_per_block(max(1, math.prod(batch)) * (d + d_v) * backend_of(xp).items_behind(x, centres, values))
    keep = None if mask is None else mask[..., None]
    (count, total, summed, product), _ = fold_blocks(add, tuple(zeros), [x, values, keep], size, xp=xp)
    counts = _column(xp, count, x.dtype)
    means, of_both = _means(xp, total, counts, centres), _means(xp, summed, counts, 0.0)
    of_values, off = of_both[..., d:], means - origin
    spreads = xp.where(counts > 0, of_both[..., :d] - off * off, 0.0)
    inside = product - xp.matrix_transpose(counts * off) @ of_values
    slopes = divide_or_zero(xp, inside, xp.sum(counts, axis=-2, keepdims=True))
    return Clusters(means, None, counts, of_values, xp.where(spreads > 0, spreads, 0.0), slopes)


def largest_rows(xp: ModuleType, x: Array, mask: Array | None, toward: Array, count: int) -> tuple[Array, Array]:
    """The rows (..., count, d) of `x` with the largest products with `toward` (..., 1, d), of those that are seen.

    And their share (..., 1) in the sum of the exponentials of all products; 0 where no row is seen.
    """
    products = (x @ xp.matrix_transpose(toward))[..., 0]
    seen = xp.isfinite(products) if mask is None else mask & xp.isfinite(products)
    products = xp.where(seen, products, -math.inf)
    order = xp.argsort(products, axis=-1, descending=True, stable=True)
    index = order[..., :count]
    weights = rescale(xp, products, xp.max(products, axis=-1, keepdims=True))
    total = xp.sum(weights, axis=-1, keepdims=True)
    share = divide_or_zero(xp, xp.sum(gather(xp, weights, index), axis=-1, keepdims=True), total)
    # rows of all items in one array, of which those of item i begin at i n
    n, items = x.shape[-2], math.prod(x.shape[:-2])
    first = xp.reshape(xp.arange(items, dtype=index.dtype, device=place_of(x)) * n, (*x.shape[:-2], 1))
    index = first + index
    rows = xp.take(xp.reshape(x, (items * n, x.shape[-1])), xp.reshape(index, (-1,)), axis=0)
    return xp.reshape(rows, (*index.shape, x.shape[-1])), share


def _before(xp: ModuleType, first: Array, second: Array) -> Array:
    """The rows of both, in a common batch."""
    batch = broadcast_batch(first=first.shape[:-2], second=second.shape[:-2])
    return xp.concat([xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (first, second)], axis=-2)


def _beside(xp: ModuleType, first: Array, second: Array) -> Array:
    """The entries of both, (..., count), in a common batch."""
    return _before(xp, first[..., None], second[..., None])[..., 0]


def sample_rows(xp: ModuleType, x: Array, mask: Array | None, count: int, seed: int) -> tuple[Array, Array | None]:
    """(a random row from each of `count` strata, which of them hold a row or None: all); all rows if n ≤ count."""
    n, holds = x.shape[-2], backend_of(xp).holds
    if holds(n <= count):
        return x, mask
    rows, sampled = uniform_rows(xp, x, mask, count, seed)
    if mask is None and not holds(n > count):  # in a program for any length, strata may be empty
        sampled = strata_hold_a_row(xp, n, count, place_of(x))
    return rows, sampled


def _column(xp: ModuleType, count: Array, dtype: Any) -> Array:
    return xp.astype(count, dtype)[..., None]


def _means(xp: ModuleType, total: Array, count: Array, otherwise: Any) -> Array:
    """Sums over their numbers; `otherwise` where there is nothing."""
    some = count > 0
    return xp.where(some, total / xp.where(some, count, 1.0), otherwise)
