"""Functions of linear algebra that a library may lack, or have for some dtypes alone: found, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from subquad.backend import Array
from subquad.core.loading import library_of


def decomposition(xp: ModuleType, name: str, like: Array, instead: str) -> Callable[..., Any]:
    """The function of this name in the library's `linalg`, for matrices of the dtype of `like`.

    NotImplementedError, with what to take `instead`, if the library has none, or none for more than 64 bits.
    """
    function = _find(xp, name)
    if function is None:
        msg = f"{library_of(xp)} has no linalg.{name}; {instead}"
        raise NotImplementedError(msg)
    if xp.finfo(like.dtype).bits > 64:
        msg = f"linalg.{name} of {library_of(xp)} has no form for {like.dtype}; {instead}, or convert to float64"
        raise NotImplementedError(msg)
    return function


def pseudo_inverse(xp: ModuleType, a: Array, rtol: float, instead: str) -> Array:
    """A⁺ of matrices (..., m, m), where singular values below rtol times the largest one count as 0.

    By the library's `pinv`, or by its singular values, or by eigenvalues: with AᵀA = V S² Vᵀ, A⁺ = V S⁻² Vᵀ Aᵀ.
    """
    if _find(xp, "pinv") is None:
        if _find(xp, "svd") is not None:
            u, s, vt = decomposition(xp, "svd", a, instead)(a, full_matrices=False)
            return xp.matrix_transpose(vt) @ (_inverses(xp, s, rtol)[..., None] * xp.matrix_transpose(u))
        if _find(xp, "eigh") is not None:
            a_t = xp.matrix_transpose(a)
            squares, v = decomposition(xp, "eigh", a, instead)(a_t @ a)
            inverse = _inverses(xp, squares, rtol**2)
            return (v * inverse[..., None, :]) @ (xp.matrix_transpose(v) @ a_t)
    return decomposition(xp, "pinv", a, instead)(a, rtol=rtol)


def _find(xp: ModuleType, name: str) -> Callable[..., Any] | None:
    return getattr(getattr(xp, "linalg", None), name, None)


def _inverses(xp: ModuleType, values: Array, rtol: float) -> Array:
    """1 / values, and 0 for those at most rtol times the largest."""
    keep = values > rtol * xp.max(values, axis=-1, keepdims=True)
    return xp.where(keep, 1 / xp.where(keep, values, 1.0), 0.0)
