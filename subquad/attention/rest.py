"""The rest of a sparse pattern: what a row does not visit enters its softmax as centroids of clusters of keys.

Keys are clustered by content within blocks of consecutive keys, so that a pattern of blocks or intervals visits most
clusters wholly or not at all, and a causal row reads the centroids of earlier blocks. In each block, the keys of the
smallest norm are clusters of one key: in trained models these draw the weight of most queries (attention sinks), and a
centroid would blur them.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from subquad.attention.key_clusters import counts_of, find_order, summarize_clusters
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_count
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.centroid_attention import centroid_attention
from subquad.kernels.cluster_summaries import cluster_spread

SIZE = 16  # keys of a cluster, by default
KEYS_PER_SINGLE = 64  # one key out of so many is a cluster of its own
SEED = 0
Parts = tuple[Array, Array]


class Centroids(NamedTuple):
    """Clusters of keys: `per_block` for each block of consecutive keys, one block after the other."""

    means: Array  # (..., C, d)
    spread: Array  # (..., C, d): variance of each channel
    mean_values: Array  # (..., C, d_v)
    members: Array  # (..., C, m), int32: the places of the keys of a cluster, −1 for none
    per_block: int
    length: int  # keys of a block

    def attend(
        self, q: Array, blocks: Array, *, scale: float, size: int, implementation: str, place: Array | None = None,
        start: Array | None = None, stop: Array | None = None, met: tuple[Array, Array] | None = None,
    ) -> Parts:  # fmt: skip
        """(out, lse) over what rows have not read, as `centroid_attention` describes it."""
        met_q, met_k = (None, None) if met is None else met
        return centroid_attention(
            q, self.means, self.spread, self.mean_values, self.members, place, blocks, start, stop, met_q, met_k,
            scale=scale, size=size, per_block=self.per_block, length=self.length,
            implementation=only_generic(implementation),
        )  # fmt: skip


def check_rest(rest: str | None, rest_size: int | None) -> None:
    """ValueError unless `rest` is None or "centroids", and `rest_size` a number of keys that takes effect."""
    if rest is not None and (not isinstance(rest, str) or rest != "centroids"):
        msg = f'rest is {rest!r}, expected "centroids", or None: what a row does not visit has no weight'
        raise ValueError(msg)
    if rest_size is not None:
        check_count("rest_size", rest_size)
        if rest is None:
            msg = f'rest_size={rest_size} would have no effect without rest="centroids"'
            raise ValueError(msg)


def centroids(
    xp: ModuleType, k: Array, v: Array, seen: Array | None, block: int, rest_size: int | None, implementation: str
) -> Centroids:
    """The clusters of keys k (..., n, d) and values v in blocks of `block` keys; hidden keys (..., n) are in none."""
    n, where = k.shape[-2], place_of(k)
    size = min(rest_size or SIZE, block)
    count = -(-n // block)
    if seen is None:
        seen = xp.ones((n,), dtype=xp.bool, device=where)
    else:  # 0 · NaN is NaN: a hidden NaN would reach means and their gradients
        k, v = (xp.where(seen[..., None], x, 0.0) for x in (k, v))
    batch = broadcast_batch(k=k.shape[:-2], seen=seen.shape[:-1])
    rows, held = xp.broadcast_to(k, (*batch, *k.shape[-2:])), xp.broadcast_to(seen, (*batch, n))
    if not isinstance(n, int) or n % block:  # the last block is filled up with hidden keys
        index = xp.arange(count * block, dtype=xp.int32, device=where)
        filled = xp.where(index < n, index, n - 1)
        rows, held = xp.take(rows, filled, axis=-2), xp.take(held, filled, axis=-1) & (index < n)
    rows, held = (xp.reshape(x, (*batch, count, block, *x.shape[len(batch) + 1 :])) for x in (rows, held))

    singles = _singles(xp, rows, held)
    of_singles = xp.astype(xp.take_along_axis(held, singles, axis=-1), xp.int32)
    singles = xp.astype(singles, xp.int32)
    names = xp.arange(block, dtype=xp.int32, device=where)
    others = held
    for s in range(singles.shape[-1]):
        others = others & (names != singles[..., s : s + 1])
    order = find_order(xp, rows, others, size, SEED, only_generic(implementation))
    counts = xp.concat([of_singles, counts_of(xp, others, size)], axis=-1)
    repeated = xp.broadcast_to(singles[..., None], (*singles.shape, size))
    order = xp.concat([xp.reshape(repeated, (*singles.shape[:-1], singles.shape[-1] * size)), order], axis=-1)

    per_block = counts.shape[-1]
    order = order + xp.arange(count, dtype=xp.int32, device=where)[:, None] * block
    order = xp.reshape(xp.where(order < n, order, n - 1), (*batch, count * per_block * size))
    counts = xp.reshape(counts, (*batch, count * per_block))
    kind = only_generic(implementation)
    spread = cluster_spread(k, None, order, counts, None, size=size, implementation=kind)
    found = summarize_clusters(k, v, order, counts, size, spread, None, kind)
    places = xp.reshape(order, (*batch, count * per_block, size))
    members = xp.where(xp.arange(size, dtype=xp.int32, device=where) < counts[..., None], places, -1)
    return Centroids(found.means, found.spread, found.mean_values, members, per_block, block)


def only_generic(implementation: str) -> str:
    """The implementation of kernels beside the one that the option `implementation` of a method names."""
    return "generic" if implementation == "generic" else "auto"


def _singles(xp: ModuleType, k: Array, seen: Array) -> Array:
    """The keys of the smallest norm of each block (..., block, d), (..., singles)."""
    k = backend_of(xp).constant(k)
    norm = xp.where(seen, xp.sum(k * k, axis=-1), xp.inf)
    count = -(-k.shape[-2] // KEYS_PER_SINGLE)
    return xp.argsort(norm, axis=-1, stable=True)[..., :count]
