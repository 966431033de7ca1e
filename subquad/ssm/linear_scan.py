"""The linear scan: the recurrence below every diagonal state-space model and gated linear RNN.

h[t] = a[t] h[t−1] + b[t]
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from array_api_compat import device

from subquad import _arrays
from subquad._dispatch import Array
from subquad.kernels.linear_scan import linear_scan as scan_kernel


def linear_scan(
    a: Array,
    b: Array,
    /,
    *,
    initial_state: Array | None = None,
    return_state: bool = False,
    reverse: bool = False,
    implementation: str = "auto",
) -> Any:
    """Linear recurrence of the first order, each channel on its own.

        h[t] = a[t] h[t−1] + b[t],    h[−1] = initial_state

    Parameters
    ----------
    a : array, shape (..., n, d)
        Factors, real or complex; of absolute value at most 1, or h grows.
    b : array, shape (..., n, d)
        Terms, real or complex. Batch axes broadcast against those of `a`.
    initial_state : array, shape (..., d), optional
        The state before the first step (with `reverse`, after the last). Default: zero.
    return_state : bool, default False
        Return (h, state) instead of h.
    reverse : bool, default False
        Run time from the end: h[t] = a[t] h[t+1] + b[t].
    implementation : str, default "auto"
        "auto", "generic", or the name of a kernel; see `subquad.explain`.

    Returns
    -------
    h : array, shape (..., n, d)
        With the common dtype of `a` and `b`, complex also if `initial_state` is, and on their device.
    state : array, shape (..., d)
        Only with `return_state`: the state after the last step, at least float32. A scan of the next chunk that
        starts from it continues this one, to rounding.

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a floating dtype.
    ValueError
        If shapes or devices do not fit; the message names the argument and the shape expected.

    See Also
    --------
    selective_scan : Factors and terms from step sizes and maps, and an output read from the state.

    Notes
    -----
    O(n d) operations and numbers held. float16 and bfloat16 are computed in float32. The generic form advances runs
    of the sequence side by side and joins them by a parallel prefix [1]_, [2]_. It multiplies consecutive factors and
    never divides; of factors beyond 1 such a product may overflow though h does not, and h is then not finite. The
    kernels that walk through time form no products. Kernel: `linear_scan`.

    References
    ----------
    .. [1] G. E. Blelloch, "Prefix Sums and Their Applications", CMU-CS-90-190, 1990, section 1.4.
    .. [2] E. Martin, C. Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", ICLR 2018.

    Examples
    --------
    A factor of 1 gives the running sum, a factor of 0 starts anew:

    >>> import numpy as np, subquad
    >>> a, b = np.asarray([1.0, 1.0, 0.0, 1.0]), np.ones((4, 1))
    >>> subquad.linear_scan(a[:, None], b)[:, 0]
    array([1., 2., 1., 2.])
    """
    _arrays.check_given(a=a, b=b)
    xp = _arrays.check_arrays(a=a, b=b, initial_state=initial_state)
    reverse = _arrays.check_flag("reverse", reverse)
    return_state = _arrays.check_flag("return_state", return_state)
    _arrays.check_floating(xp, complex_too=True, a=a, b=b, initial_state=initial_state)
    n, d = _check_shapes(a, b, initial_state)
    batches = {"a": a.shape[:-2], "b": b.shape[:-2]}
    batches |= {} if initial_state is None else {"initial_state": initial_state.shape[:-1]}
    batch = _arrays.broadcast_batch(**batches)
    held = _arrays.compute_dtype(xp, a, b, initial_state)

    def flat(x: Array | None, rank: int) -> Array | None:
        return None if x is None else _arrays.flatten_batch(xp, _arrays.cast(xp, x, held), batch, rank)

    start = flat(initial_state, 1)
    h = scan_kernel(flat(a, 2), flat(b, 2), start, reverse=reverse, implementation=implementation)
    out = _arrays.cast(xp, xp.reshape(h, (*batch, n, d)), _dtype_out(xp, a, b, held))
    if not return_state:
        return out
    if n:
        row = 0 if reverse else n - 1
        state = xp.concat([h[:, row : row + 1, :]], axis=1)  # a copy: a view would keep all of h in memory
    else:
        state = xp.zeros((*batch, d), dtype=held, device=device(b)) if start is None else start
    return out, xp.reshape(state, (*batch, d))


def _check_shapes(a: Array, b: Array, initial_state: Array | None) -> tuple[int, int]:
    if a.ndim < 2:
        msg = f"a has shape {tuple(a.shape)}, expected (..., n, d) with at least two axes"
        raise ValueError(msg)
    n, d = a.shape[-2:]
    if tuple(b.shape[-2:]) != (n, d):
        msg = f"b has shape {tuple(b.shape)}, expected (..., {n}, {d}): one term per factor of a {tuple(a.shape)}"
        raise ValueError(msg)
    if initial_state is not None and tuple(initial_state.shape[-1:]) != (d,):
        msg = f"initial_state has shape {tuple(initial_state.shape)}, expected (..., {d}): one number per channel"
        raise ValueError(msg)
    return n, d


def _dtype_out(xp: ModuleType, a: Array, b: Array, held: Any) -> Any:
    """The common dtype of a and b; one of them complex where the state is."""
    dtype = _arrays.common_dtype(xp, a, b)
    if xp.isdtype(held, "complex floating") and not _arrays.is_dtype(xp, dtype, "complex floating"):
        return xp.complex128 if dtype == xp.float64 else xp.complex64
    return dtype
