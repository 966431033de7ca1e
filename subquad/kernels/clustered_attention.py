"""Softmax attention to clusters of keys: a few clusters are opened for each row, the others enter as their centroids.

    out[i] = Σ_j e^{x[i, j]} v[j] + Σ_c e^{w[i, c]} v̄[c]   over their sum of weights,    x[i, j] = s q[i]·k[j]
    w[i, c] = s q[i]·μ[c] + s² ((q[i]·u[c])² + Σ_b τ[c, b] Σ_{l in b} q[i, l]²) / 4 + log n[c]

j runs over the keys of the clusters that row i opens, those of the largest w, and c over the others. With a `share`, a
row opens those of them alone whose e^{w} is at least that share of the sum of its weights. μ and v̄ are means
of the n keys of a cluster and of their values. What s² / 4 stands before is the variance of q·k over the cluster if its
covariance is u uᵀ and, beside that, the same for all channels of a band b. The term is half of what the mean of e^{x}
asks for if keys are Gaussian: less, because the v̄ of a cluster fits its heavy keys less. All weights are positive, so
outputs are convex combinations of values.

Clusters may come in groups, each with the mean and the spread of all its keys. A row then weighs the groups as if they
were clusters, expands those of the largest w into their clusters, and reads each other group as one centroid.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import BLOCK_ELEMENTS, fold_blocks
from subquad.core.dtypes import compute_dtype
from subquad.core.gather import gather_rows
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.kernels.block_attention import batch_of, join
from subquad.kernels.max_shift import bounded, divide_or_zero, finite_shift

SPREAD = 0.25  # weight of the variance of s q·k in w
BANDS = 4  # runs of channels, at most, in which what u leaves of the variance is the same for all


def bands_of(d: int) -> int:
    """How many bands d channels have: runs of ⌈d / BANDS⌉ of them."""
    return -(-d // -(-d // BANDS)) if d else 0


def band_sums(xp: ModuleType, x: Array) -> Array:
    """The sums (..., bands) of x (..., d) over the channels of each band."""
    d, bands = x.shape[-1], bands_of(x.shape[-1])
    width = -(-d // BANDS)
    lacking = bands * width - d
    if lacking:
        x = xp.concat([x, xp.zeros((*x.shape[:-1], lacking), dtype=x.dtype, device=place_of(x))], axis=-1)
    return xp.sum(xp.reshape(x, (*x.shape[:-1], bands, width)), axis=-1)


def outputs(
    q: Array, k: Array, v: Array, order: Array | None, means: Array, spread: Array, mean_values: Array, counts: Array,
    group_means: Array | None, group_spread: Array | None, group_values: Array | None, stop: Array,
    place: Array | None, cluster_of: Array | None, before_out: Array | None, before_lse: Array | None, /,
    *, scale: float, opened: int, always: int = 0, reach: int = 0, group: int = 1, expanded: int = 0, share: float = 0,
) -> tuple[Like, ...]:  # fmt: skip
    """Shape and dtype of the outputs of `clustered_attention`."""
    matrices = {"q": q, "k": k, "v": v, "means": means, "spread": spread, "mean_values": mean_values,
                "group_means": group_means, "group_spread": group_spread, "group_values": group_values,
                "before_out": before_out}  # fmt: skip
    of_rows = {"counts": counts, "stop": stop, "order": order, "place": place, "cluster_of": cluster_of,
               "before_lse": before_lse}  # fmt: skip
    batch = batch_of(matrices, of_rows, None)
    lse = Like((*batch, q.shape[-2]), compute_dtype(namespace_of(q), q))
    return Like((*batch, q.shape[-2], v.shape[-1]), q.dtype), lse


@kernel(outputs=outputs, options={"always": 0, "reach": 0, "group": 1, "expanded": 0, "share": 0.0}, reads_half=True)
def clustered_attention(
    q: Array, k: Array, v: Array, order: Array | None, means: Array, spread: Array, mean_values: Array, counts: Array,
    group_means: Array | None, group_spread: Array | None, group_values: Array | None, stop: Array,
    place: Array | None, cluster_of: Array | None, before_out: Array | None, before_lse: Array | None, /,
    *, scale: float, opened: int, always: int = 0, reach: int = 0, group: int = 1, expanded: int = 0, share: float = 0,
) -> tuple[Array, Array]:  # fmt: skip
    """Softmax attention (..., n, d_v) to opened clusters and to the centroids of others, and its log-sum-exp (..., n).

        k                        (..., C · d, size)   the keys of each cluster as columns, one cluster after the other
        v                        (..., C · size, d_v)   the values of each cluster as rows
        means                    (..., C, d)          mean of the keys of a cluster
        spread                   (..., C, d + bands)  u and τ of the keys of a cluster, `bands_of` d
        mean_values, counts      (..., C, d_v), (..., C)   mean of its values, and how many of its places hold a key,
                                                      int32: the first ones
        stop                     (..., n)             row i sees the clusters 0 … stop[i] − 1; it opens the first
                                                      `always` of them, and the `opened` others of the largest w
        share                                         of these others, only those with at least this share of the
                                                      weight of all clusters but the first ones, and of other keys
        group_means, group_spread, group_values   (..., G, d), (..., G, d + bands), (..., G, d_v)   the same of the
                                                      keys of `group` clusters, one group after the other, from
                                                      cluster `always` on. A row expands the `expanded` groups of the
                                                      largest w of those whose clusters it sees all
        order                    (..., C · size)      the place of each key in the sequence
        place                    (..., n)             row i sees the keys at most `reach` places from place[i]
                                                      elsewhere: here they count in no sum
        cluster_of               (..., n_kv)          the cluster of the key at each place, −1 for none
        before_out, before_lse   (..., n, d_v), (..., n)   output and log-sum-exp over other keys, which are joined

    order, place and cluster_of are None together, and so are those of groups, and before_out and before_lse. q may have
    half precision in place of float32, which the output has too.
    """
    xp, where = namespace_of(q), place_of(q)
    n, d, d_v, clusters = q.shape[-2], q.shape[-1], v.shape[-1], means.shape[-2]
    out, lse = outputs(
        q, k, v, order, means, spread, mean_values, counts, group_means, group_spread, group_values, stop, place,
        cluster_of, before_out, before_lse, scale=scale, opened=opened,
    )  # fmt: skip
    batch, size = out.shape[:-2], k.shape[-1]
    if clusters == 0 or n == 0 or 0 in batch:
        if before_out is not None and before_lse is not None:
            return xp.broadcast_to(before_out, out.shape), xp.broadcast_to(before_lse, lse.shape)
        made = xp.zeros(out.shape, dtype=out.dtype, device=where)
        return made, xp.full(lse.shape, -math.inf, dtype=lse.dtype, device=where)
    names = xp.arange(clusters, dtype=xp.int32, device=where)
    within = xp.arange(size, dtype=xp.int32, device=where)
    total = xp.astype(counts, q.dtype)
    closed = _centroids(xp, means, spread, mean_values)
    groups, closed_groups = 0, None
    if group_means is not None and group_spread is not None and group_values is not None:
        groups = group_means.shape[-2]
        closed_groups = _centroids(xp, group_means, group_spread, group_values)
    lasts = (names[:groups] + 1) * group + (always - 1)  # the last cluster of each group
    has_group = (names >= always) & (names < always + groups * group)
    group_of = xp.where(has_group, (names - always) // group, 0)
    values, finite = closed.values, closed.finite
    if closed_groups is not None:
        values = xp.concat([values, closed_groups.values], axis=-2)
        finite = xp.concat([finite, closed_groups.finite], axis=-1)
    columns = xp.reshape(k, (*k.shape[:-2], clusters, d * size))

    def attend(_: None, q: Array, stop: Array, place: Any, before: Any) -> tuple[None, Array]:
        q = q * scale
        left = xp.broadcast_to(total[..., None, :], (*batch, q.shape[-2], clusters))
        if place is not None and cluster_of is not None:
            left = left - _near_keys(xp, place, reach, cluster_of, names, q.dtype)
        visible, rest_of_groups = names < stop, None
        if closed_groups is not None:
            members = left[..., always : always + groups * group]
            members = xp.sum(xp.reshape(members, (*members.shape[:-1], groups, group)), axis=-1)
            rest_of_groups = closed_groups.weights(xp, q, members, lasts < stop)
            expands = _largest(xp, rest_of_groups, names[:groups], stop, expanded, 0)
            is_expanded = _is_among(expands, names[:groups], rest_of_groups > math.inf)
            rest_of_groups = xp.where(is_expanded, -math.inf, rest_of_groups)
            shut = (lasts < stop) & ~is_expanded
            visible = visible & ~(xp.take(shut, group_of, axis=-1) & has_group)
        weight = closed.weights(xp, q, left, visible)
        bound = None
        if share > 0:
            others = None if before is None else xp.broadcast_to(before, (*weight.shape[:-1], 1))
            parts = [x for x in (weight[..., always:], rest_of_groups, others) if x is not None]
            bound = math.log(share) + _log_sum_exp(xp, xp.concat(parts, axis=-1))
        found = _largest(xp, weight, names, stop, opened, always, bound)
        rest = xp.where(_is_among(found, names, weight > math.inf), -math.inf, weight)
        rest = rest if rest_of_groups is None else xp.concat([rest, rest_of_groups], axis=-1)

        index = xp.reshape(xp.where(found < 0, 0, found)[..., None] * size + within, (*found.shape[:-1], -1))
        members_k = gather_rows(xp, columns, xp.where(found < 0, 0, found), axes=2)
        members_k = xp.reshape(members_k, (*members_k.shape[:-1], d, size))
        members_k = xp.where(found[..., None, None] < 0, 0.0, members_k)
        members_v = gather_rows(xp, v, index, axes=2)
        member = xp.reshape(within < _gathered(xp, counts, found)[..., None], index.shape)
        if place is not None and order is not None:
            distance = gather_rows(xp, order[..., None], index, axes=2)[..., 0] - place
            member = member & ((distance > reach) | (distance < -reach))
        exact = xp.reshape(q[..., None, None, :] @ members_k, index.shape)
        exact = xp.where(member, exact, -math.inf)

        both = xp.concat([exact, rest], axis=-1)
        shift = finite_shift(xp, xp.max(both, axis=-1, keepdims=True))
        both = xp.exp(both - shift)
        denominator = xp.sum(both, axis=-1, keepdims=True)
        of_members, of_rest = both[..., : exact.shape[-1]], both[..., exact.shape[-1] :]
        fine = xp.all(xp.isfinite(members_v), axis=-1)
        poison = xp.any(member & ~fine, axis=-1, keepdims=True)
        poison = poison | xp.any((rest > -math.inf) & ~finite, axis=-1, keepdims=True)
        numerator = (of_members[..., None, :] @ xp.where(fine[..., None], members_v, 0.0))[..., 0, :]
        numerator = xp.where(poison, math.nan, numerator + of_rest @ values)
        none = denominator == 0
        lse = xp.where(none, -math.inf, shift + xp.log(xp.where(none, 1.0, denominator)))
        return None, xp.concat([divide_or_zero(xp, numerator, denominator), lse], axis=-1)

    heads = max(1, math.prod(batch)) * backend_of(xp).items_behind(q, k, v)
    width = heads * (2 * (clusters + groups) + (always + opened) * size * (d + d_v + 2))
    _, joined = fold_blocks(
        attend,
        None,
        [q, *(None if x is None else x[..., None] for x in (stop, place, before_lse if share > 0 else None))],
        max(1, BLOCK_ELEMENTS // width),
        xp=xp,
    )
    assert joined is not None
    found = joined[..., :d_v], joined[..., d_v]
    if before_out is not None and before_lse is not None:
        return join(xp, (before_out, before_lse), found)
    return found


class Centroids(NamedTuple):
    """What stands for closed clusters; what is not finite is 0 here, and told of."""

    means: Array  # (..., C, d)
    spread: Array  # (..., C, d + bands)
    values: Array  # (..., C, d_v)
    finite_keys: Array  # (..., 1, C)
    finite: Array  # (..., 1, C): of the values

    def weights(self, xp: ModuleType, q: Array, left: Array, visible: Array) -> Array:
        """The weights w (..., n, C) of clusters that have keys left and are visible, −∞ of others."""
        d = q.shape[-1]
        along, bands = (xp.matrix_transpose(x) for x in (self.spread[..., :d], self.spread[..., d:]))
        variance = (q @ along) ** 2 + bounded(xp, band_sums(xp, q * q)) @ bands
        logits = q @ xp.matrix_transpose(self.means) + bounded(xp, SPREAD * variance)
        logits = xp.where(self.finite_keys, logits, math.nan)
        seen = (left > 0) & visible
        return xp.where(seen, logits + xp.log(xp.where(seen, left, 1.0)), -math.inf)


def _centroids(xp: ModuleType, means: Array, spread: Array, values: Array) -> Centroids:
    # what is not finite must reach the rows that see it and no others, gradients too: 0 · NaN is NaN
    finite = xp.all(xp.isfinite(values), axis=-1, keepdims=True)
    of_means, of_spread = (xp.all(xp.isfinite(x), axis=-1, keepdims=True) for x in (means, spread))
    finite_keys = of_means & of_spread
    means, spread = (xp.where(finite_keys, x, 0.0) for x in (means, spread))
    values = xp.where(finite, values, 0.0)
    return Centroids(means, spread, values, xp.matrix_transpose(finite_keys), xp.matrix_transpose(finite))


def _is_among(found: Array, names: Array, none: Array) -> Array:
    """Which clusters (..., n, C) are among those found. `none` is False, with an axis of items under `vmap`."""
    for r in range(found.shape[-1]):
        none = none | (found[..., r : r + 1] == names)
    return none


def _log_sum_exp(xp: ModuleType, x: Array) -> Array:
    """The logarithm of the sum of exp(x) over the last axis, which stays; −∞ where all x are."""
    shift = finite_shift(xp, xp.max(x, axis=-1, keepdims=True))
    total = xp.sum(xp.exp(x - shift), axis=-1, keepdims=True)
    return xp.where(total == 0, -math.inf, shift + xp.log(xp.where(total == 0, 1.0, total)))


def _largest(
    xp: ModuleType, weight: Array, names: Array, stop: Array, opened: int, always: int, bound: Array | None = None
) -> Array:
    """The clusters that rows open, int32 (..., n, ≤ always + opened): the first ones, then the heaviest ones.

    Of the heaviest ones, those whose weight reaches the bound (..., n, 1) of the row.
    """
    first = xp.where(names[:always] < stop, names[:always], -1)
    first = xp.broadcast_to(first, (*weight.shape[:-1], always)) if always else None
    ranked = weight[..., always:]
    order = xp.argsort(ranked, axis=-1, descending=True, stable=True)[..., : min(opened, ranked.shape[-1])]
    heaviest = xp.take_along_axis(ranked, order, axis=-1)
    opens = heaviest > -math.inf if bound is None else (heaviest > -math.inf) & (heaviest >= bound)
    found = xp.where(opens, xp.astype(order, xp.int32) + always, -1)
    return found if first is None else xp.concat([first, found], axis=-1)


def _near_keys(xp: ModuleType, place: Array, reach: int, cluster_of: Array, names: Array, dtype: Any) -> Array:
    """How many keys of each cluster lie within `reach` of `place` (..., n, 1), as (..., n, C)."""
    n_kv, count = cluster_of.shape[-1], xp.zeros_like(place)
    for t in range(-reach, reach + 1):
        at = place + t
        exists = (at >= 0) & (at < n_kv)
        own = gather_rows(xp, cluster_of[..., None], xp.where(exists, at, 0)[..., 0])
        count = count + xp.astype((own == names) & exists, count.dtype)
    return xp.astype(count, dtype)


def _gathered(xp: ModuleType, counts: Array, found: Array) -> Array:
    """The number of keys of each opened cluster; 0 where none was opened."""
    own = gather_rows(xp, counts[..., None], xp.where(found < 0, 0, found), axes=2)[..., 0]
    return xp.where(found < 0, 0, own)
