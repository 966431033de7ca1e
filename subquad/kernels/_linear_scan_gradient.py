"""The gradient of the linear scan, written with linear scans, so that it can be differentiated in its turn.

G[t] = ∂h[t] + conj(a[t+1]) G[t+1],    ∂b = G,    ∂a[t] = G[t] conj(h[t−1]),    ∂h[−1] = conj(a[0]) G[0]
"""

from __future__ import annotations

from array_api_compat import array_namespace, device

from subquad._dispatch import Array
from subquad.kernels.linear_scan import linear_scan


def linear_scan_gradient(
    a: Array, h: Array, initial_state: Array | None, grad_h: Array, /, *, reverse: bool
) -> tuple[Array, Array, Array | None]:
    """Gradients by a, b and the initial state, ∂/∂Re + i ∂/∂Im of a real loss; n ≥ 1.

    As the scan: a, h, grad_h are (batch, n, d), initial_state (batch, d); h is what the scan returned.
    """
    xp = array_namespace(a)
    batch, _, d = a.shape
    zero = xp.zeros((batch, 1, d), dtype=a.dtype, device=device(a))
    start = zero if initial_state is None else xp.reshape(initial_state, (batch, 1, d))
    tail, head = slice(1, None), slice(None, -1)
    next_a = xp.concat([zero, a[:, head, :]] if reverse else [a[:, tail, :], zero], axis=1)
    previous_h = xp.concat([h[:, tail, :], start] if reverse else [start, h[:, head, :]], axis=1)
    G = linear_scan(_conj(next_a), grad_h, None, reverse=not reverse)
    first = a.shape[1] - 1 if reverse else 0
    grad_state = None if initial_state is None else _conj(a[:, first, :]) * G[:, first, :]
    return G * _conj(previous_h), G, grad_state


def _conj(x: Array) -> Array:
    """conj of complex numbers; the standard has none of real ones."""
    xp = array_namespace(x)
    return xp.conj(x) if xp.isdtype(x.dtype, "complex floating") else x
