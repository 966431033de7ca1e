"""Positive features whose directions are drawn as wide as q and k are spread: "DERF" of FAVOR#, with a canonical basis.

With x = √|s| (q − q̄) M and y = √|s| (k − k̄) M⁻¹, for symmetric matrices M and B and directions ω ~ N(0, I),

    exp(x·y) = E[φ_q(x) φ_k(y)],    φ_q(x) = exp(u·x − |x|²/2 + b(ω)),    φ_k(y) = exp(u·y − |y|²/2),

    u = ω B,    b(ω) = log det B + (|ω|² − |u|²)/2.

This is importance sampling: FAVOR+ draws u from N(0, I), here it comes from N(0, B²), and exp(b) is the ratio of the
densities. It is the dense-exponential feature ωᵀAω + ωᵀBx + xᵀCx + log D of Likhosherstov et al. with A = (I − B²)/4,
C = −I/2 and D = det(B)^½. What depends on neither ω nor the key cancels in attention, and log det B with it.

    M    balances: M Σ_q M = M⁻¹ Σ_k M⁻¹ =: T. This is the square root of the geometric mean of Σ_q⁻¹ and Σ_k, and of
         all maps that make Σ_q and Σ_k equal, the symmetric one.
    B    minimises the mean logarithm of the second moment of φ_q φ_k in each eigendirection of S = 2 T, which is
         E[(x + y)(x + y)ᵀ]: B² = (3 + 2 S + (1 + 12 S + 4 S²)^½) / 4, or A = (1 − 2 S − ((1 + 2 S)² + 8 S)^½) / 16.

M and B are functions of Σ_q and Σ_k as matrices. No eigenvector enters alone, whose sign or, for equal eigenvalues,
direction is another on each library. The covariances are shrunk by SHRINKAGE towards multiples of I, so that rows which
do not fill the space, or are all equal, have a map too.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from subquad.attention.call import ArrayOptions
from subquad.attention.given_arrays import from_host
from subquad.attention.means import mean_row
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_given
from subquad.core.decompositions import decomposition
from subquad.core.loading import backend_of

SHRINKAGE = 0.03  # share of the mean variance that is added to each: M is then precise in float32, B hardly wider


class Statistics(NamedTuple):
    """What the features depend on. Means have shape (..., 1, d), matrices (..., d, d)."""

    q_mean: Array
    k_mean: Array
    q_map: Array  # M
    k_map: Array  # M⁻¹
    spread: Array  # B


MEANS = 2  # the first fields, which a user gives as (..., d)


def check_statistics(statistics: Any, features: Any) -> None:
    """Raise TypeError or ValueError unless the option `statistics` is None, or five arrays for "derf"."""
    if statistics is None:
        return
    if features != "derf":
        msg = f'statistics belong to features="derf"; features={features!r} would not read them'
        raise ValueError(msg)
    if not isinstance(statistics, tuple) or len(statistics) != len(Statistics._fields):
        expected = f"a tuple of five arrays ({', '.join(Statistics._fields)}), as with_statistics makes it"
        msg = f"statistics must be {expected}, got {statistics!r}"
        raise TypeError(msg)
    named = zip(Statistics._fields, statistics, strict=True)
    check_given(**{f"statistics[{i}] ({name})": x for i, (name, x) in enumerate(named)})


def given_statistics(xp: ModuleType, statistics: tuple[Array, ...] | None, like: Array) -> ArrayOptions:
    """The option `statistics`, checked, in the library and dtype and on the device of `like`; constants."""
    if statistics is None:
        msg = "a state needs the same statistics for every chunk; fix them: method.with_statistics(q, k)"
        raise ValueError(msg)
    d, found = like.shape[-1], {}
    for i, (name, x) in enumerate(zip(Statistics._fields, statistics, strict=True)):
        x = from_host(xp, name, x, like)
        tail = (d,) if i < MEANS else (d, d)
        if tuple(x.shape[-len(tail) :]) != tail:
            expected = ", ".join(map(str, tail))
            msg = f"{name} has shape {tuple(x.shape)}, expected (..., {expected}) for q of {d} channels"
            raise ValueError(msg)
        x = backend_of(xp).constant(x)
        found[name] = xp.expand_dims(x, axis=-2) if i < MEANS else x
    return found


def find_statistics(
    xp: ModuleType, q: Array, k: Array, q_mask: Array | None, k_mask: Array | None, scale: float
) -> Statistics:
    """The statistics of the rows that the masks keep and that are finite; constants for gradients."""
    backend = backend_of(xp)
    q, k = backend.constant(q), backend.constant(k)
    q_mean, k_mean = mean_row(xp, q, q_mask), mean_row(xp, k, k_mask)
    (q_size, q_shape), (k_size, k_shape) = _covariance(xp, q, q_mean, q_mask), _covariance(xp, k, k_mean, k_mask)
    one = xp.ones_like(q_size)
    both_spread = (q_size > 0) & (k_size > 0)
    ratio = xp.where(both_spread, k_size / xp.where(q_size > 0, q_size, one), one)  # of lengths: the root of M
    root, inverse = _functions(xp, q_shape, _root, _inverse_root)
    (middle,) = _functions(xp, root @ k_shape @ root, _root)
    q_map, k_map = _functions(xp, inverse @ middle @ inverse, _root, _inverse_root)
    both = (2 * abs(scale)) * q_size * k_size * (q_map @ q_shape @ q_map)
    (spread,) = _functions(xp, both, _best_spread)
    return Statistics(q_mean, k_mean, q_map * ratio**0.5, k_map / ratio**0.5, spread)


def _root(x: Array) -> Array:
    return x**0.5


def _inverse_root(x: Array) -> Array:
    return x**-0.5


def _best_spread(s: Array) -> Array:
    # √B² of an eigenvalue s of S; 1 + 12 s + 4 s² in two factors, which do not overflow
    low, high = 3 - 8**0.5, 3 + 8**0.5
    return ((3 + 2 * s + (low + 2 * s) ** 0.5 * (high + 2 * s) ** 0.5) / 4) ** 0.5


def directions(xp: ModuleType, found: Statistics, omega_t: Array, scale: float) -> tuple[Array, Array]:
    """(W_k, W_q), (..., d + 1, m) each, of the map `Exponential` for `mapped_keys` and `mapped_queries`.

    ω is given transposed, (d, m). Beside u, W_k has the term s q̄·(k − k̄), which centring takes out of the logits.
    """
    u = found.spread @ omega_t
    offset = (xp.sum(omega_t * omega_t, axis=-2, keepdims=True) - xp.sum(u * u, axis=-2, keepdims=True)) / 2
    root = abs(scale) ** 0.5
    W_k = root * u + scale * xp.matrix_transpose(found.q_mean @ found.q_map)
    W_q = (-root if scale < 0 else root) * (found.q_map @ u)
    return xp.concat([W_k, xp.zeros_like(W_k[..., :1, :])], axis=-2), _below(xp, W_q, offset)


def mapped_keys(xp: ModuleType, found: Statistics, k: Array) -> Array:
    """[(k − k̄) M⁻¹, 0], as wide as the queries."""
    k = (k - found.k_mean) @ found.k_map
    return xp.concat([k, xp.zeros_like(k[..., :1])], axis=-1)


def mapped_queries(xp: ModuleType, found: Statistics, q: Array) -> Array:
    """[q − q̄, 1]: M is in W_q, whose last row the one meets."""
    q = q - found.q_mean
    return xp.concat([q, xp.ones_like(q[..., :1])], axis=-1)


def _covariance(xp: ModuleType, x: Array, mean: Array, mask: Array | None) -> tuple[Array, Array]:
    """(σ, Σ/σ²) of rows, with the mean variance σ² (..., 1, 1), and the latter shrunk; (0, I) if all rows are equal."""
    x = x - mean
    keep = xp.all(xp.isfinite(x), axis=-1, keepdims=True)
    keep = keep if mask is None else keep & mask[..., None]
    x = xp.where(keep, x, 0.0)
    count = xp.sum(xp.astype(keep, x.dtype), axis=-2, keepdims=True)
    sigma = xp.matrix_transpose(x) @ (x / xp.where(count > 0, count, xp.ones_like(count)))
    eye = xp.eye(x.shape[-1], dtype=x.dtype, device=place_of(x))
    size = xp.sum(sigma * eye, axis=(-2, -1), keepdims=True) / x.shape[-1]
    spread = (size > 0) & xp.isfinite(size)
    shape = xp.where(spread, sigma, eye) / xp.where(spread, size, xp.ones_like(size))
    return xp.where(spread, size, xp.zeros_like(size)) ** 0.5, shape + SHRINKAGE * eye


def _functions(xp: ModuleType, symmetric: Array, *functions: Callable[[Array], Array]) -> list[Array]:
    """Functions of a positive semidefinite matrix: of its eigenvalues, in the basis of its eigenvectors."""
    symmetric = (symmetric + xp.matrix_transpose(symmetric)) / 2
    values, vectors = decomposition(xp, "eigh", symmetric, 'take features="positive"')(symmetric)
    least = float(xp.finfo(values.dtype).eps)  # of rounding, which may leave them below 0
    values = xp.where(values > least, values, xp.full_like(values, least))
    return [(vectors * f(values)[..., None, :]) @ xp.matrix_transpose(vectors) for f in functions]


def _below(xp: ModuleType, x: Array, row: Array) -> Array:
    # `row` (..., 1, m) below the rows of x
    return xp.concat([x, xp.broadcast_to(row, (*x.shape[:-2], *row.shape[-2:]))], axis=-2)
