"""Values of clusters of keys, fitted by ridge regression to exact attention at m representative queries.

    F(q) = softmax(s q μᵀ + s² (q∘q) σ²ᵀ / 2 + log n)    attention to clusters of n keys with means μ, variances σ²
    out  = F(q) W + q L,    W = v̄ + Δ − r̄ D,    L = s Γ + D
    Δ, D = argmin ‖F(R) (v̄ + Δ) + s R Γ + (R − r̄) D − O‖² + λ (g ‖Δ‖² + h ‖D‖²)

where v̄ are the means of the values in the clusters, R representative queries with mean r̄ and O exact attention at
them, and g and h the means of the diagonals of F(R)ᵀ F(R) and (R − r̄)ᵀ (R − r̄). Were the logits of the keys in a
cluster normally distributed with independent channels, F would be its share of attention. A query also moves the mean
of values inside each cluster, by s q times their covariance with the keys, to first order; Γ is the mean of these
covariances over all keys. A large λ leaves v̄ and Γ, a small one interpolates O. Unless it is given, λ is the one of
LAMBDAS with which each row of O is predicted best from the others. Clusters without keys stand at the mean of all
keys, where no logit exceeds all others.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

from subquad.attention.kmeans import Clusters
from subquad.attention.pseudo_inverse import INSTEAD
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.decompositions import decomposition
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.max_shift import divide_or_zero, rescale
from subquad.kernels.softmax_attention import softmax_attention

LAMBDAS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of those that predict equally well, the first one counts
EQUAL = 1e-3  # errors that differ less, relative to the least, are equal: a single row leaves nothing but rounding
REFINED = 2  # steps of refinement: more change no digit of float32 with the smallest λ


class Fit(NamedTuple):
    """What is read in place of keys and values: out = F(q) W + q L."""

    values: Array  # W, (..., m, d_v)
    slope: Array  # L, (..., d, d_v)


def fit_values(
    xp: ModuleType,
    rows: Array,
    valid: Array | None,
    found: Clusters,
    targets: Array,
    *,
    scale: float,
    ridge: float | None,
) -> Fit:
    """W and L for `rows` R and `targets` O; rows that are not valid do not count."""
    assert found.values is not None
    prior = summary(xp, found, scale)
    F = _weights(xp, rows, found, scale)
    keep = xp.all(xp.isfinite(F), axis=-1, keepdims=True)
    if valid is not None:
        keep = keep & valid[..., None]
    F, rows = xp.where(keep, F, 0.0), xp.where(keep, rows, 0.0)
    missing = xp.where(keep, targets - F @ prior.values - rows @ prior.slope, 0.0)
    number = xp.sum(xp.astype(keep, rows.dtype), axis=-2, keepdims=True)
    middle = divide_or_zero(xp, xp.sum(rows, axis=-2, keepdims=True), number)
    off = xp.where(keep, rows - middle, 0.0)
    size, length = _root_mean_square(xp, F), _root_mean_square(xp, off)
    features = xp.concat([F / size, off / length], axis=-1)
    found_by = _solve(xp, features, missing, _best(xp, features, missing) if ridge is None else ridge)
    m = F.shape[-1]
    turn = found_by[..., m:, :] / length
    return Fit(prior.values + found_by[..., :m, :] / size - middle @ turn, prior.slope + turn)


def summary(xp: ModuleType, found: Clusters, scale: float) -> Fit:
    """What is read with a large λ: v̄ and s Γ."""
    assert found.values is not None
    if found.slopes is not None:
        return Fit(found.values, scale * found.slopes)
    d, d_v = found.means.shape[-1], found.values.shape[-1]
    batch = broadcast_batch(means=found.means.shape[:-2], values=found.values.shape[:-2])
    return Fit(found.values, xp.zeros((*batch, d, d_v), dtype=found.values.dtype, device=place_of(found.values)))


def read_values(xp: ModuleType, q: Array, found: Clusters, fit: Fit, *, scale: float) -> Array:
    """F(q) W + q L in blocks of queries; counts weigh the numerator and the denominator of attention to the means."""
    shares = divide_or_zero(xp, found.counts, xp.max(found.counts, axis=-2, keepdims=True))
    weighted = shares * fit.values
    both = xp.concat([weighted, xp.broadcast_to(shares, (*weighted.shape[:-1], 1))], axis=-1)
    keys = _keys(xp, found)

    def attend(_: None, rows: Array) -> tuple[None, Array]:
        sums = softmax_attention(_with_squares(xp, rows, scale), keys, both, scale=scale)
        return None, divide_or_zero(xp, sums[..., :-1], sums[..., -1:]) + rows @ fit.slope

    batch = broadcast_batch(q=q.shape[:-2], means=keys.shape[:-2], values=both.shape[:-2])
    width = max(both.shape[-1], keys.shape[-1])
    size = rows_per_block(math.prod(batch) * width * backend_of(xp).items_behind(q, both), min_rows=256)
    _, out = fold_blocks(attend, None, [q], size, xp=xp)
    return out


def _keys(xp: ModuleType, found: Clusters) -> Array:
    """(μ, σ²) (..., m, 2 d); clusters without keys have the mean of all keys, and no variance."""
    total = xp.sum(found.counts * found.means, axis=-2, keepdims=True)
    middle = divide_or_zero(xp, total, xp.sum(found.counts, axis=-2, keepdims=True))
    means = xp.where(found.counts > 0, found.means, middle)
    spreads = xp.zeros_like(means) if found.spreads is None else found.spreads
    return xp.concat([means, xp.broadcast_to(spreads, means.shape)], axis=-1)


def _with_squares(xp: ModuleType, q: Array, scale: float) -> Array:
    """(q, s q∘q / 2) (..., n, 2 d), whose products with (μ, σ²), times s, are the logits of F."""
    return xp.concat([q, q * q * (scale / 2)], axis=-1)


def _weights(xp: ModuleType, rows: Array, found: Clusters, scale: float) -> Array:
    """F(R), (..., r, m); a row of 0 where all counts are 0."""
    logits = (_with_squares(xp, rows, scale) * scale) @ xp.matrix_transpose(_keys(xp, found))
    weights = rescale(xp, logits, xp.max(logits, axis=-1, keepdims=True)) * xp.matrix_transpose(found.counts)
    return divide_or_zero(xp, weights, xp.sum(weights, axis=-1, keepdims=True))


def _solve(xp: ModuleType, features: Array, missing: Array, ridge: float | Array) -> Array:
    """X = (ΦᵀΦ + λ I)⁻¹ Φᵀ T of features Φ and what is missing T, for a λ that broadcasts to (..., 1, 1).

    ΦᵀΦ squares the condition number. The residual of X, of Φ itself, is solved for and added a few times, which gives
    back the digits that the square has lost (Björck, 1987, "corrected seminormal equations").
    """
    turned, eye = (
        xp.matrix_transpose(features),
        xp.eye(features.shape[-1], dtype=features.dtype, device=place_of(features)),
    )
    inverse = decomposition(xp, "inv", features, INSTEAD)(turned @ features + ridge * eye)
    out = inverse @ (turned @ missing)
    for _ in range(REFINED):
        out = out + inverse @ (turned @ (missing - features @ out) - ridge * out)
    return out


def _root_mean_square(xp: ModuleType, x: Array) -> Array:
    """The root of the mean of the diagonal of xᵀx, (..., 1, 1); 1 where it is 0."""
    mean = xp.sum(x * x, axis=(-2, -1), keepdims=True) / x.shape[-1]
    return xp.sqrt(xp.where(mean == 0, 1.0, mean))


def _best(xp: ModuleType, features: Array, missing: Array) -> Array:
    """The λ (..., 1, 1) with which each row of what is missing is predicted best from the other rows.

    A fit without row i misses it by α_i / M_ii, where M = (ΦΦᵀ + λ I)⁻¹ and α = M T, and one decomposition of ΦΦᵀ
    serves all λ.
    """
    strengths = xp.asarray(LAMBDAS, dtype=features.dtype, device=place_of(features))
    squares, axes = decomposition(xp, "eigh", features, INSTEAD)(features @ xp.matrix_transpose(features))
    squares, along = xp.where(squares > 0, squares, 0.0), xp.matrix_transpose(axes) @ missing
    errors = []
    for strength in LAMBDAS:
        inverse = 1.0 / (squares + strength)
        off = (axes @ (inverse[..., None] * along)) / ((axes * axes) @ inverse[..., None])
        errors.append(xp.sum(off * off, axis=(-2, -1)))
    found = xp.stack(errors, axis=-1)
    good = found <= (1 + EQUAL) * xp.min(found, axis=-1, keepdims=True)
    best = xp.argmax(xp.astype(good, xp.int32), axis=-1)
    chosen = xp.take(strengths, xp.reshape(best, (-1,)), axis=0)
    return xp.reshape(chosen, (*best.shape, 1, 1))
