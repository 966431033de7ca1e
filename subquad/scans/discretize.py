"""Discretisation of diagonal state-space models: h'(τ) = A h(τ) + B u(τ), sampled in steps of Δ.

h[t] = Ā h[t−1] + B̄ u[t]
"""

from __future__ import annotations

from types import ModuleType

from subquad.backend import Array
from subquad.core.checks import check_arrays, check_choice, check_floating, check_given
from subquad.core.dtypes import cast, common_dtype, compute_dtype
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch

METHODS = ("zoh", "bilinear", "euler", "mamba")
SERIES_BOUND, SERIES_TERMS = 2.0**-10, 4  # the first term left out, x^5 / 6!, is below 2^-59


def discretize(A: Array, B: Array, delta: Array, method: str) -> tuple[Array, Array]:
    """Discretise a diagonal state-space model h' = A h + B u with a step Δ, as h[t] = Ā h[t−1] + B̄ u[t].

        "zoh"         Ā = exp(Δ A),                      B̄ = (exp(Δ A) − 1) / A · B
        "bilinear"    Ā = (1 + Δ A / 2) / (1 − Δ A / 2), B̄ = Δ / (1 − Δ A / 2) · B
        "euler"       Ā = 1 + Δ A,                       B̄ = Δ B
        "mamba"       Ā = exp(Δ A),                      B̄ = Δ B

    Parameters
    ----------
    A : array, shape (..., d, d_state)
        Diagonal state matrix, per unit of time, real or complex.
    B : array, shape (..., d, d_state)
        Input map, real or complex.
    delta : array, shape (..., d)
        Step sizes Δ, real, in the unit of time of `A`; each holds for the d_state states of its channel.
    method : {"zoh", "bilinear", "euler", "mamba"}
        The rule:

        - "zoh", zero-order hold: exact for an input that is constant during each step;
        - "bilinear", the trapezoidal rule or Tustin's method: stable for every Δ if the real part of A is negative;
        - "euler", the forward rule: unstable for \\|1 + Δ A\\| > 1;
        - "mamba": the hold for A and Euler's rule for B, as in `subquad.selective_scan`.

    Returns
    -------
    A_bar, B_bar : array, shape (..., d, d_state)
        Ā and B̄, in the common dtype of the three arrays; their shapes broadcast to each other. Where A is 0, B̄ is its
        limit Δ B, and so are the derivatives.

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a floating dtype, or a complex `delta`.
    ValueError
        If `method` is unknown, or shapes or devices do not fit.

    See Also
    --------
    lti_scan : The scan with these factors.

    Notes
    -----
    With A = −1, B = 1 and Δ = softplus(z), "zoh" gives Ā = 1 − σ(z) and B̄ = σ(z): the gate of a gated RNN [1]_. What
    "zoh" divides by A is summed as a series where \\|Δ A\\| is below 2⁻¹⁰.

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, theorem 1.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> z = np.asarray([-2.0, 0.0, 3.0])
    >>> A, B, delta = -np.ones((3, 1)), np.ones((3, 1)), np.log1p(np.exp(z))
    >>> A_bar, B_bar = subquad.discretize(A, B, delta, "zoh")
    >>> gate = 1 / (1 + np.exp(-z))
    >>> bool(np.allclose(A_bar[:, 0], 1 - gate) and np.allclose(B_bar[:, 0], gate))
    True
    """
    check_choice("method", method, METHODS)
    check_given(A=A, B=B, delta=delta)
    xp = check_arrays(A=A, B=B, delta=delta)
    check_floating(xp, complex_too=True, A=A, B=B)
    check_floating(xp, delta=delta)
    for name, x in (("A", A), ("B", B)):
        if x.ndim == 0:
            msg = f"{name} has shape (), expected (..., d, d_state)"
            raise ValueError(msg)
    broadcast_batch(A=tuple(A.shape), B=tuple(B.shape), **{"delta[..., None]": (*delta.shape, 1)})
    out, compute = common_dtype(xp, A, B, delta), compute_dtype(xp, A, B, delta)
    A, B, delta = (cast(xp, x, compute) for x in (A, B, delta))
    with backend_of(xp).computing(A):
        growth, B_bar = growth_and_input(xp, A, B, delta, method)
        A_bar = xp.exp(xp.expand_dims(delta, axis=-1) * A) if method in ("zoh", "mamba") else 1 + growth
    return xp.astype(A_bar, out), xp.astype(B_bar, out)


def growth_and_input(xp: ModuleType, A: Array, B: Array, delta: Array, method: str) -> tuple[Array, Array]:
    """(Ā − 1, B̄) of checked arrays of one dtype: of a slow decay, Ā − 1 has all the digits that Ā itself lacks."""
    delta = cast(xp, delta[..., None], A.dtype)  # which may be complex
    x = delta * A
    if method == "euler":
        return x, delta * B
    if method == "bilinear":
        share = 1 / (1 - x / 2)
        return x * share, delta * share * B
    growth = _expm1(xp, x)
    return growth, delta * (B if method == "mamba" else _mean_of_exp(xp, x, growth) * B)


def _expm1(xp: ModuleType, x: Array) -> Array:
    """exp(x) − 1, of a complex number by functions of real ones: with e = exp(Re x), θ = Im x / 2,

        exp(x) − 1 = (e − 1) − 2 e sin² θ + 2 i e sin θ cos θ,

    whose error is some units in the last place of |exp(x) − 1| also where x is small.
    """
    if not xp.isdtype(x.dtype, "complex floating"):
        return xp.expm1(x)
    growth, half = xp.expm1(xp.real(x)), xp.imag(x) * 0.5
    sine = xp.sin(half)
    twice = (growth + 1) * (sine * 2)
    real, imag = (xp.astype(y, x.dtype) for y in (growth - twice * sine, twice * xp.cos(half)))
    return real + imag * 1j


def _mean_of_exp(xp: ModuleType, x: Array, growth: Array) -> Array:
    """growth / x = ∫₀¹ exp(s x) ds for growth = exp(x) − 1, with its limit 1, and its derivatives, at x = 0.

    The quotient itself keeps its digits near 0, and only its derivatives lose them: without derivatives the limit at 0
    is all that is missing.
    """
    if backend_of(xp).fills_in_place:  # such a library has no derivatives
        zero = x == 0
        if not xp.any(zero):
            return growth / x
        return xp.where(zero, xp.ones_like(x), growth / xp.where(zero, xp.ones_like(x), x))
    near = xp.abs(x) < SERIES_BOUND
    small = xp.where(near, x, xp.zeros_like(x))
    series = xp.ones_like(x)
    for k in range(SERIES_TERMS, 0, -1):
        series = 1 + small * series / (k + 1)
    return xp.where(near, series, growth / xp.where(near, xp.ones_like(x), x))
