"""What is told of clusters of rows: their rows side by side, the mean of each, and how far its rows spread.

A cluster has `size` places in an order of rows, and rows at the first of them. Which rows these are is constant for
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import BLOCK_ELEMENTS, join_rows
from subquad.core.dtypes import compute_dtype
from subquad.core.gather import gather_rows
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.clustered_attention import band_sums, bands_of
from subquad.kernels.max_shift import bounded

SPREAD_STEPS = 2  # of power iteration, towards the direction in which the rows of a cluster spread most


def outputs_of_members(
    x: Array, order: Array, counts: Array, /, *, size: int, turned: bool = False
) -> tuple[Like, ...]:
    """Shape and dtype of the outputs of `cluster_members`."""
    batch = broadcast_batch(x=x.shape[:-2], order=order.shape[:-1], counts=counts.shape[:-1])
    clusters, width = counts.shape[-1], x.shape[-1]
    shape = (clusters * width, size) if turned else (clusters * size, width)
    dtype = compute_dtype(namespace_of(x), x)
    return Like((*batch, *shape), dtype), Like((*batch, clusters, width), dtype)


@kernel(outputs=outputs_of_members, options={"turned": False}, reads_half=True)
def cluster_members(
    x: Array, order: Array, counts: Array, /, *, size: int, turned: bool = False
) -> tuple[Array, Array]:
    """(members (..., C · size, width), means (..., C, width)): the rows x (..., n, width) in their clusters.

    Place s of cluster c holds row `order`[c · size + s] (..., C · size), int32, if s < `counts`[c] (..., C), int32, and
    else 0. With `turned`, the members of a cluster are columns, (..., C · width, size). The mean of no row is 0.
    Rows may have half precision in place of float32, which the outputs have.
    """
    xp, (clusters, width) = namespace_of(x), (counts.shape[-1], x.shape[-1])

    def gather(order: Array, counts: Array) -> tuple[Array, Array]:
        rows, share = _rows(xp, x, order, counts, size)
        side_by_side = xp.matrix_transpose(rows) if turned else rows
        return xp.reshape(side_by_side, (*rows.shape[:-2], size * width)), xp.sum(rows * share, axis=-2)

    members, means = _by_clusters(xp, gather, order, counts, None, x, size)
    shape = (clusters * width, size) if turned else (clusters * size, width)
    return xp.reshape(members, (*members.shape[:-2], *shape)), means


def outputs_of_spread(
    x: Array, seen: Array | None, order: Array, counts: Array, sight: Array | None, /, *, size: int
) -> tuple[Like, ...]:
    """Shape and dtype of the output of `cluster_spread`."""
    rows = {"x": x, "seen": seen, "sight": sight}
    shapes = {name: array.shape[:-2] for name, array in rows.items() if array is not None}
    batch, d = broadcast_batch(**shapes, order=order.shape[:-1], counts=counts.shape[:-1]), x.shape[-1]
    shape = (*batch, counts.shape[-1], d if seen is None else d + bands_of(d))
    return (Like(shape, compute_dtype(namespace_of(x), x)),)


@kernel(outputs=outputs_of_spread, reads_half=True)
def cluster_spread(
    x: Array, seen: Array | None, order: Array, counts: Array, sight: Array | None, /, *, size: int
) -> Array:
    """How far the rows x (..., n, d) of each cluster spread: (..., C, d + bands), as `spread_of` tells it.

    `order` and `counts` are those of `cluster_members`, `seen` (..., n, d) the same rows in the metric of queries, and
    `sight` (..., C, d) the mean squares of the channels of queries. Without both, it is the variance of each channel,
    (..., C, d). x may have half precision in place of float32, which the output has.
    """
    xp = namespace_of(x)

    def spread(order: Array, counts: Array, sight: Array | None = None) -> tuple[Array]:
        far, share = _around_mean(xp, x, order, counts, size)
        if seen is None or sight is None:
            return (bounded(xp, xp.sum(far * far * share, axis=-2)),)
        return (spread_of(xp, far, share, _around_mean(xp, seen, order, counts, size)[0], sight),)

    return _by_clusters(xp, spread, order, counts, sight, x, size)[0]


def spread_of(xp: ModuleType, far: Array, share: Array, seen: Array, sight: Array, rest: Array | None = None) -> Array:
    """What is told of the covariance Σ share · far farᵀ of rows `far` (..., rows, d) with `share` (..., rows, 1).

    u (d), with u uᵀ along the direction in which they spread most as queries see it, and for each band the mean of the
    variance of its channels that is left, with `rest` (..., bands) added: (..., d + bands). `seen` (..., rows, d) are
    the same rows in the metric of the queries, and `sight` (..., d) the mean squares of their channels, by which
    channels are weighed: what no query looks at does not count.
    """
    size = backend_of(xp).constant(xp.max(xp.abs(seen), axis=(-2, -1), keepdims=True))
    x = seen / xp.where(size > 0, size, 1.0)
    square, weighted = xp.sum(x * x, axis=-1, keepdims=True), x * share
    direction = xp.take_along_axis(x, xp.argmax(square, axis=-2, keepdims=True), axis=-2)
    for _ in range(SPREAD_STEPS):
        direction = direction / _length(xp, direction)
        direction = xp.sum(xp.sum(x * direction, axis=-1, keepdims=True) * weighted, axis=-2, keepdims=True)
    along = xp.sum(x * (direction / _length(xp, direction)), axis=-1, keepdims=True)
    # Σ g / √(gᵀ Σ g) for along = far g: what is left of the covariance has no negative variance, whatever g is
    total = xp.sum(share * along * along, axis=-2, keepdims=True)
    some = total > 0
    root = xp.where(some, xp.where(some, total, 1.0) ** -0.5, 0.0)
    u = (xp.sum(share * along * far, axis=-2, keepdims=True) * root)[..., 0, :]
    rest_of_channels = bounded(xp, xp.sum(share * far * far, axis=-2)) - bounded(xp, u * u)
    left = band_sums(xp, rest_of_channels * sight) / band_sums(xp, sight)
    left = xp.clip(left, min=0.0)  # a difference of nearly equal numbers may be below
    return xp.concat([u, left if rest is None else left + rest], axis=-1)


def _length(xp: ModuleType, x: Array) -> Array:
    """The length of rows (..., d), as (..., 1); 1 of a row of 0."""
    square = xp.sum(x * x, axis=-1, keepdims=True)
    return xp.where(square > 0, square, 1.0) ** 0.5


def _rows(xp: ModuleType, x: Array, order: Array, counts: Array, size: int) -> tuple[Array, Array]:
    """The rows (..., C, size, width) of clusters, 0 at places without one, and the share of each (..., C, size, 1)."""
    flat = xp.reshape(order, (*order.shape[:-2], order.shape[-2] * size))
    rows = gather_rows(xp, x, flat)
    rows = xp.reshape(rows, (*rows.shape[:-2], *order.shape[-2:], x.shape[-1]))
    holds = (xp.arange(size, dtype=xp.int32, device=place_of(x)) < counts[..., None])[..., None]
    share = xp.astype(holds, x.dtype) / xp.astype(xp.where(counts > 0, counts, 1), x.dtype)[..., None, None]
    # other places hold what a mask hides: not even a gradient may meet it
    return xp.where(holds, rows, 0.0), share


def _around_mean(xp: ModuleType, x: Array, order: Array, counts: Array, size: int) -> tuple[Array, Array]:
    """`_rows` less the mean of each cluster, where there are any."""
    rows, share = _rows(xp, x, order, counts, size)
    return xp.where(share > 0, rows - xp.sum(rows * share, axis=-2, keepdims=True), 0.0), share


def _by_clusters(
    xp: ModuleType, function: Callable[..., tuple[Array, ...]], order: Array, counts: Array, sight: Array | None,
    x: Array, size: int,
) -> tuple[Array, ...]:  # fmt: skip
    """The outputs (..., C, width) of a function of the order (..., C, size), counts and sight of clusters, in parts."""
    clusters = counts.shape[-1]
    grouped = xp.reshape(order, (*order.shape[:-1], clusters, size))
    at_once = max(1, BLOCK_ELEMENTS // max(1, math.prod(x.shape[:-2]) * size * x.shape[-1]))

    def some(i: slice) -> tuple[Array, ...]:
        more = () if sight is None else (sight[..., i, :],)
        return function(grouped[..., i, :], counts[..., i], *more)

    def parts() -> Iterator[tuple[Array, ...]]:
        for i in range(0, clusters, at_once):
            yield some(slice(i, i + at_once))

    if clusters <= at_once or not backend_of(xp).is_concrete(x, order):
        return some(slice(0, clusters))
    return join_rows(xp, clusters, parts())
