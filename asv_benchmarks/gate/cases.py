"""What the gate measures: a small fixed set on NumPy, milliseconds each.

Each entry returns a call that is ready to be timed. It uses the public interface alone, so that older trees can be
measured too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

HEADS, D, D_STATE = 4, 64, 16
Call = Callable[[], Any]


def _normal(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(0))
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def _attention(method: str, n: int, *, causal: bool = False) -> Call:
    import subquad  # whose tree this is, only the worker's path says

    q, k, v = _normal(*3 * [(HEADS, n, D)])
    return lambda: subquad.attention(q, k, v, method, causal=causal)


def _scan(n: int) -> Call:
    import subquad

    d = HEADS * D
    u, delta, z, B, C = _normal(*3 * [(1, n, d)], *2 * [(1, n, D_STATE)])
    A, D_skip, bias = _parameters(d)
    return lambda: subquad.selective_scan(u, delta, A, B, C, D_skip, z=z, delta_bias=bias, delta_softplus=True)


def _step() -> Call:
    import subquad

    d = HEADS * D
    state, u, delta, z, B, C = _normal((1, d, D_STATE), *3 * [(1, d)], *2 * [(1, D_STATE)])
    A, D_skip, bias = _parameters(d)
    options = {"z": z, "delta_bias": bias, "delta_softplus": True}
    return lambda: subquad.selective_scan_step(state, u, delta, A, B, C, D_skip, **options)


def _parameters(d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, D and the bias of the step sizes, as Mamba starts from them."""
    A = np.tile(-np.arange(1, D_STATE + 1, dtype=np.float32), (d, 1))
    return A, np.ones(d, np.float32), np.full(d, np.log(np.expm1(0.01)), np.float32)


CASES: dict[str, Callable[[], Call]] = {
    "exact n=1024": lambda: _attention("exact", 1024),
    "favor n=4096": lambda: _attention("favor", 4096),
    "favor causal n=1024": lambda: _attention("favor", 1024, causal=True),
    "nystrom n=4096": lambda: _attention("nystrom", 4096),
    "selective_scan n=2048": lambda: _scan(2048),
    "selective_scan_step": _step,
}
