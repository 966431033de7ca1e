"""The selective state-space scan (S6) of Mamba (Gu & Dao, 2023).

h[t] = exp(Δ[t] A) h[t−1] + Δ[t] B[t] u[t],    y[t] = C[t]·h[t] + D u[t]
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from subquad import _arrays
from subquad._dispatch import Array
from subquad.kernels.selective_scan import selective_scan as scan_kernel
from subquad.ssm._shapes import Shapes, check_inputs

INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    /,
    *,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
    return_state: bool = False,
    reverse: bool = False,
    implementation: str = "auto",
) -> Any:
    """Selective state-space scan (S6), diagonal in the state.

        Δ[t] = softplus(delta[t] + delta_bias)         (the sum itself without delta_softplus)
        h[t] = exp(Δ[t] A) h[t−1] + Δ[t] B[t] u[t],    h[−1] = initial_state
        y[t] = (C[t]·h[t] + D u[t]) silu(z[t])         (2 Re(C[t]·h[t]) for complex A)

    Parameters
    ----------
    u : array, shape (..., n, d)
        Input sequence, real floating dtype.
    delta : array, shape (..., n, d)
        Step sizes, in the unit of time of `A`; positive after bias and softplus.
    A : array, shape (d, d_state)
        Diagonal state matrix, per unit of time, real or complex; a negative real part keeps h bounded.
    B, C : array, shape (..., n, d_state) or (..., n, groups, d_state) or (d, d_state)
        Input and output maps: of each step, of each step and group of d / groups consecutive channels, or constant.
        Batch axes as `u` has them: beside a `u` with any, two axes are always constant maps (d, d_state), also where
        n = d; what could be groups or a batch axis that `u` lacks raises. Complex only if `A` is.
    D : array, shape (d,), optional
        Skip connection.
    z : array, shape (..., n, d), optional
        Gate: the output is multiplied by silu(z) = z / (1 + exp(−z)).
    delta_bias : array, shape (d,), optional
        Added to `delta` first.
    delta_softplus : bool, default False
        Apply softplus(x) = log1p(exp(x)) to the step sizes.
    initial_state : array, shape (..., d, d_state), optional
        The state before the first step (with `reverse`, after the last). Default: zero.
    return_state : bool, default False
        Return (y, state) instead of y.
    reverse : bool, default False
        Run time from the end: h[t] = exp(Δ[t] A) h[t+1] + Δ[t] B[t] u[t].
    implementation : str, default "auto"
        "auto", "generic", or the name of a kernel; see `subquad.explain`.

    Returns
    -------
    y : array, shape (..., n, d)
        With the dtype and on the device of `u`.
    state : array, shape (..., d, d_state)
        Only with `return_state`: the state after the last step, at least float32, complex if `A` is. A scan of the
        next chunk that starts from it continues this one, to rounding.

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a floating dtype.
    ValueError
        If shapes or devices do not fit; the message names the argument and the shape expected.

    See Also
    --------
    selective_scan_step : One step of the same recurrence.

    Notes
    -----
    O(n d d_state) operations; the generic form holds O(d d_state) states at a time. A is discretised by zero-order
    hold and B by Euler's rule, as the reference implementation of [1]_ does. A state that is not finite stays so, and
    reaches no other channel; compiled kernels may have NaN where the generic form has infinity, for they compute
    h + (exp(Δ A) − 1) h where a decay is slow, which loses no digits of a number next to 1. Kernel: `selective_scan`.

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, algorithm 2.

    Examples
    --------
    With A = 0 and unit maps the state is a running sum:

    >>> import numpy as np, subquad
    >>> one = np.ones((3, 1))
    >>> subquad.selective_scan(one, one, np.zeros((1, 1)), one, one)[:, 0]
    array([1., 2., 3.])
    """
    arrays = dict(zip(INPUTS, (u, delta, A, B, C, D, z, delta_bias, initial_state), strict=True))
    shapes = check_inputs(arrays, time=1)
    return_state = _arrays.check_flag("return_state", return_state)
    y, state = scan_checked(arrays, shapes, delta_softplus, implementation, reverse=reverse)
    return (y, state) if return_state else y


def scan_checked(
    arrays: dict[str, Any], shapes: Shapes, delta_softplus: bool, implementation: str, *, reverse: bool = False
) -> tuple[Array, Array]:
    """y and the last state of inputs that fit."""
    softplus = _arrays.check_flag("delta_softplus", delta_softplus)
    reverse = _arrays.check_flag("reverse", reverse)
    u, delta, A, B, C, D, z, delta_bias, initial_state = (arrays[name] for name in INPUTS)
    xp, batch, forms = shapes.xp, shapes.batch, shapes.forms
    real, held = _dtypes(xp, arrays)
    stored = real  # of the rows: half precision stays where all have it, for a kernel that reads and writes it
    if all(x is None or x.dtype == u.dtype for x in (delta, z)) and _arrays.is_half(xp, u.dtype):
        stored = u.dtype

    def flat(x: Array | None, dtype: Any) -> Array | None:
        return None if x is None else _arrays.flatten_batch(xp, _arrays.cast(xp, x, dtype), batch, 2)

    def flat_map(name: str, x: Array) -> Array:
        if x.dtype != stored:
            x = _arrays.cast(xp, x, held if _arrays.is_dtype(xp, x.dtype, "complex floating") else real)
        if not forms[name]:
            return x
        if forms[name] == 2:
            x = xp.expand_dims(x, axis=-2)
        alone = all(size == 1 for size in x.shape[:-3])
        return xp.reshape(x, (1, *x.shape[-3:])) if alone else _arrays.flatten_batch(xp, x, batch, 3)

    y, state = scan_kernel(
        flat(u, stored),
        flat(delta, stored),
        _arrays.cast(xp, A, held),
        flat_map("B", B),
        flat_map("C", C),
        _arrays.cast(xp, D, real),
        flat(z, stored),
        _arrays.cast(xp, delta_bias, real),
        flat(initial_state, held),
        delta_softplus=softplus,
        reverse=reverse,
        implementation=implementation,
    )
    y = xp.reshape(_arrays.cast(xp, y, u.dtype), (*batch, *u.shape[-2:]))
    return y, xp.reshape(state, (*batch, shapes.d, shapes.d_state))


def _dtypes(xp: ModuleType, arrays: dict[str, Any]) -> tuple[Any, Any]:
    """(dtype of the real arrays, dtype of the state), at least float32 and complex64."""
    common = _arrays.common_dtype(xp, *arrays.values())
    is_complex = _arrays.is_dtype(xp, arrays["A"].dtype, "complex floating")
    wide = xp.result_type(common, xp.float32) not in (xp.float32, xp.complex64)
    real = xp.float64 if wide else xp.float32
    if not is_complex:
        return real, real
    return real, xp.complex128 if wide else xp.complex64
