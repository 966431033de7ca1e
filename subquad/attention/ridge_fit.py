"""Values of clusters of keys, fitted by ridge regression to exact attention at m representative queries.

    F(q) = softmax(s q μᵀ + log n)    attention to the means μ of clusters, each counted n times
    W = v̄ + argmin_Δ ‖F(R) (v̄ + Δ) − O‖² + λ g ‖Δ‖²,    g = mean of the diagonal of F(R)ᵀ F(R)

where v̄ are the means of the values in the clusters, R representative queries and O exact attention at them. A large λ
leaves the values v̄, a small one interpolates O. Unless it is given, λ is the one of LAMBDAS that predicts every fifth
row of O best from the others. Clusters without keys stand at the mean of all keys, where no logit exceeds all others.
"""

from __future__ import annotations

import math
from types import ModuleType

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

LAMBDAS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # where several predict equally well, the first counts
REFINED = 2  # steps of refinement: more change no digit of float32 with the smallest λ
HELD_OUT = 5  # one row of this many is held out


def fit_values(
    xp: ModuleType,
    rows: Array,
    valid: Array | None,
    found: Clusters,
    targets: Array,
    *,
    scale: float,
    ridge: float | None,
) -> Array:
    """W (..., m, d_v) for `rows` R and `targets` O; rows that are not valid do not count."""
    F = _weights(xp, rows, found, scale)
    keep = xp.all(xp.isfinite(F), axis=-1, keepdims=True)
    if valid is not None:
        keep = keep & valid[..., None]
    F = xp.where(keep, F, 0.0)
    missing = xp.where(keep, targets - F @ found.values, 0.0)
    return found.values + _solve(xp, F, missing, _best(xp, F, missing) if ridge is None else ridge, refine=REFINED)


def read_values(xp: ModuleType, q: Array, found: Clusters, values: Array, *, scale: float) -> Array:
    """F(q) W in blocks of queries; counts weigh the numerator and the denominator of attention to the means."""
    shares = divide_or_zero(xp, found.counts, xp.max(found.counts, axis=-2, keepdims=True))
    weighted = shares * values
    both = xp.concat([weighted, xp.broadcast_to(shares, (*weighted.shape[:-1], 1))], axis=-1)
    means = _occupied(xp, found)

    def attend(_: None, rows: Array) -> tuple[None, Array]:
        sums = softmax_attention(rows, means, both, scale=scale)
        return None, divide_or_zero(xp, sums[..., :-1], sums[..., -1:])

    batch = broadcast_batch(q=q.shape[:-2], means=means.shape[:-2], values=both.shape[:-2])
    size = rows_per_block(math.prod(batch) * both.shape[-1] * backend_of(xp).items_behind(q, both), min_rows=256)
    _, out = fold_blocks(attend, None, [q], size, xp=xp)
    return out


def _occupied(xp: ModuleType, found: Clusters) -> Array:
    """The means, with that of all keys in place of the means of clusters without keys."""
    total = xp.sum(found.counts * found.means, axis=-2, keepdims=True)
    middle = divide_or_zero(xp, total, xp.sum(found.counts, axis=-2, keepdims=True))
    return xp.where(found.counts > 0, found.means, middle)


def _weights(xp: ModuleType, rows: Array, found: Clusters, scale: float) -> Array:
    """F(R), (..., r, m); a row of 0 where all counts are 0."""
    logits = (rows * scale) @ xp.matrix_transpose(_occupied(xp, found))
    weights = rescale(xp, logits, xp.max(logits, axis=-1, keepdims=True)) * xp.matrix_transpose(found.counts)
    return divide_or_zero(xp, weights, xp.sum(weights, axis=-1, keepdims=True))


def _solve(xp: ModuleType, F: Array, missing: Array, ridge: float | Array, *, refine: int = 0) -> Array:
    """Δ = (FᵀF + λ g I)⁻¹ Fᵀ (O − F v̄), for a λ that broadcasts to (..., 1, 1).

    FᵀF squares the condition number. `refine` times, the residual of Δ, of F itself, is solved for and added, which
    gives back the digits that the square has lost (Björck, 1987, "corrected seminormal equations").
    """
    F_t, eye = xp.matrix_transpose(F), xp.eye(F.shape[-1], dtype=F.dtype, device=place_of(F))
    strength = ridge * _mean_square(xp, F)
    inverse = decomposition(xp, "inv", F, INSTEAD)(F_t @ F + strength * eye)
    delta = inverse @ (F_t @ missing)
    for _ in range(refine):
        delta = delta + inverse @ (F_t @ (missing - F @ delta) - strength * delta)
    return delta


def _mean_square(xp: ModuleType, F: Array) -> Array:
    """g, the mean of the diagonal of FᵀF, (..., 1, 1); 1 where it is 0."""
    g = xp.sum(F * F, axis=(-2, -1), keepdims=True) / F.shape[-1]
    return xp.where(g == 0, 1.0, g)


def _best(xp: ModuleType, F: Array, missing: Array) -> Array:
    """The λ (..., 1, 1) with which the other rows predict the rows that are held out best."""
    index = xp.arange(F.shape[-2], device=place_of(F))[:, None]
    held = index % HELD_OUT == min(HELD_OUT, F.shape[-2]) - 1
    kept_F, kept = xp.where(held, 0.0, F), xp.where(held, 0.0, missing)
    strengths = xp.asarray(LAMBDAS, dtype=F.dtype, device=place_of(F))
    # one decomposition FᵀF = U Λ Uᵀ serves all λ: Δ = U (Λ + λ g I)⁻¹ Uᵀ Fᵀ (O − F v̄)
    squares, axes = decomposition(xp, "eigh", F, INSTEAD)(xp.matrix_transpose(kept_F) @ kept_F)
    g = _mean_square(xp, kept_F)
    turned, along = F @ axes, xp.matrix_transpose(axes) @ (xp.matrix_transpose(kept_F) @ kept)
    errors = []
    for i in range(len(LAMBDAS)):
        shrunk = along / (xp.where(squares > 0, squares, 0.0)[..., None] + LAMBDAS[i] * g)
        off = xp.where(held, missing - turned @ shrunk, 0.0)
        errors.append(xp.sum(off * off, axis=(-2, -1)))
    best = xp.argmin(xp.stack(errors, axis=-1), axis=-1)
    chosen = xp.take(strengths, xp.reshape(best, (-1,)), axis=0)
    return xp.reshape(chosen, (*best.shape, 1, 1))
