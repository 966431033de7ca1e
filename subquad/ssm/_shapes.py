"""Shapes of the inputs of a selective scan, and the three forms of its maps B and C."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from subquad._dispatch import Array


def check_shapes(xp: ModuleType, arrays: dict[str, Any]) -> tuple[int, int, int]:
    """(n, d, d_state) of inputs, by name, that fit; which form B and C have is for `map_rank` to say."""
    u, A = arrays["u"], arrays["A"]
    if u.ndim < 2:
        msg = f"u has shape {tuple(u.shape)}, expected (..., n, d) with at least two axes"
        raise ValueError(msg)
    n, d = u.shape[-2:]
    if A.ndim != 2 or A.shape[0] != d or A.shape[1] == 0:
        msg = f"A has shape {tuple(A.shape)}, expected ({d}, d_state): one row per channel of u {tuple(u.shape)}"
        raise ValueError(msg)
    d_state = A.shape[1]
    for name, tail in {"delta": (n, d), "z": (n, d), "initial_state": (d, d_state)}.items():
        x = arrays[name]
        if x is not None and tuple(x.shape[-2:]) != tail:
            msg = f"{name} has shape {tuple(x.shape)}, expected (..., {tail[0]}, {tail[1]})"
            raise ValueError(msg)
    for name in ("D", "delta_bias"):
        x = arrays[name]
        if x is not None and tuple(x.shape) != (d,):
            msg = f"{name} has shape {tuple(x.shape)}, expected ({d},): one number per channel"
            raise ValueError(msg)
    if not xp.isdtype(A.dtype, "complex floating"):
        for name in ("B", "C", "initial_state"):
            x = arrays[name]
            if x is not None and xp.isdtype(x.dtype, "complex floating"):
                msg = f"{name} is complex ({x.dtype}) but A is real; make A complex too, or take the real part"
                raise TypeError(msg)
    for name in ("B", "C"):
        if arrays[name].ndim < 2 or arrays[name].shape[-1] != d_state:
            got = tuple(arrays[name].shape)
            expected = f"(..., {n}, {d_state}), (..., {n}, groups, {d_state}) or ({d}, {d_state})"
            msg = f"{name} has shape {got}, expected {expected}"
            raise ValueError(msg)
    return n, d, d_state


def map_rank(name: str, x: Array, rank: int, n: int, d: int) -> int:
    """Axes of B or C after the batch: 0 constant, 2 one map per step, 3 one per step and group."""
    got, tail = tuple(x.shape), x.shape[-1]
    expected = f"(..., {n}, {tail}), (..., {n}, groups, {tail}) or ({d}, {tail})"
    if x.ndim == 2 and (rank > 2 or is_constant(name, x, n, d, "n")):
        if x.shape[0] != d:
            msg = f"{name} has shape {got}, expected {expected}"
            raise ValueError(msg)
        return 0
    if x.ndim == rank and x.shape[-2] == n:
        return 2
    if x.ndim == rank + 1 and x.shape[-3] == n and x.shape[-2] and d % x.shape[-2] == 0:
        return 3
    msg = f"{name} has shape {got}, expected {expected} for u with {rank} axes; groups must divide d = {d}"
    raise ValueError(msg)


def is_constant(name: str, x: Array, rows: int, d: int, axis: str) -> bool:
    """Is a two-axis map beside a two-axis u constant? Where both readings fit, the caller must say."""
    if x.shape[0] == rows == d > 1:
        msg = (
            f"{name} of shape {tuple(x.shape)} could be (d, d_state) or ({axis}, d_state), since {axis} = d = {d}; "
            f"add a batch axis of length 1 to all inputs but A, D and delta_bias (and to {name} if it is not constant)"
        )
        raise ValueError(msg)
    return x.shape[0] not in (rows, 1) or (x.shape[0] == 1 and rows != 1 and d == 1)
