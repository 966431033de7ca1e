"""One step of the selective scan, for decoding."""

from __future__ import annotations

from subquad import _arrays
from subquad._dispatch import Array
from subquad.ssm._shapes import is_constant
from subquad.ssm.selective_scan import selective_scan


def selective_scan_step(
    state: Array | None,
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
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """One step of `selective_scan`, for decoding token by token: the same numbers, without the axis of time.

        h ← exp(Δ A) h + Δ B u,    y = (C·h + D u) silu(z)

    Parameters
    ----------
    state : array, shape (..., d, d_state), or None
        The state before the step; None is zero.
    u, delta : array, shape (..., d)
        Input and step sizes of one token.
    A : array, shape (d, d_state)
        Diagonal state matrix, real or complex.
    B, C : array, shape (..., d_state) or (..., groups, d_state) or (d, d_state)
        Input and output maps.
    D : array, shape (d,), optional
        Skip connection.
    z : array, shape (..., d), optional
        Gate.
    delta_bias : array, shape (d,), optional
        Added to `delta` first.
    delta_softplus : bool, default False
        Apply softplus to the step sizes.
    implementation : str, default "auto"
        "auto", "generic", or the name of a kernel.

    Returns
    -------
    y : array, shape (..., d)
        With the dtype of `u`.
    state : array, shape (..., d, d_state)
        The state after the step; the one given is not written to.

    Raises
    ------
    TypeError, ValueError
        As `selective_scan`.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> one, state = np.ones(1), None
    >>> for _ in range(3):
    ...     y, state = subquad.selective_scan_step(state, one, one, np.zeros((1, 1)), one, one)
    >>> y
    array([3.])
    """
    _arrays.check_given(u=u, delta=delta, A=A, B=B, C=C)
    xp = _arrays.check_arrays(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, state=state)
    if u.ndim == 0:
        msg = f"u has shape {tuple(u.shape)}, expected (..., d)"
        raise ValueError(msg)

    def token(x: Array | None) -> Array | None:
        return None if x is None else xp.expand_dims(x, axis=-2)

    def token_map(name: str, x: Array) -> Array:
        if x.ndim == u.ndim + 1:
            return xp.expand_dims(x, axis=-3)
        if x.ndim == 2 and (u.ndim > 2 or is_constant(name, x, u.shape[0], u.shape[-1], "batch")):
            return x
        return xp.expand_dims(x, axis=-2)

    y, state = selective_scan(
        token(u),
        token(delta),
        A,
        token_map("B", B),
        token_map("C", C),
        D,
        z=token(z),
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=state,
        return_state=True,
        implementation=implementation,
    )
    return y[..., 0, :], state
