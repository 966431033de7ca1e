"""One step of the selective scan, for decoding."""

from __future__ import annotations

from subquad._dispatch import Array
from subquad.ssm._shapes import check_inputs
from subquad.ssm.selective_scan import INPUTS, scan_checked

STEP_INPUTS = (*INPUTS[:-1], "state")


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
        Input and output maps, as `selective_scan` reads them.
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
    arrays = dict(zip(STEP_INPUTS, (u, delta, A, B, C, D, z, delta_bias, state), strict=True))
    shapes = check_inputs(arrays, time=0)
    xp, forms = shapes.xp, {name: rank + 1 if rank else 0 for name, rank in shapes.forms.items()}
    arrays["initial_state"] = arrays.pop("state")
    for name, axes in {"u": 2, "delta": 2, "z": 2, **forms}.items():
        if axes and arrays[name] is not None:
            arrays[name] = xp.expand_dims(arrays[name], axis=-axes)
    y, state = scan_checked(arrays, shapes._replace(forms=forms), delta_softplus, implementation)
    return y[..., 0, :], state
