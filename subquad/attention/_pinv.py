"""A⁺ X for the small square matrices A of Nyström attention.

"iterative" is the third-order iteration of Xiong et al. (2021), eq. (17); "exact" cuts off singular values; "ridge" is
(AᵀA + λ I)⁻¹ Aᵀ X.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from array_api_compat import device

from subquad import _arrays
from subquad._dispatch import Array
from subquad.kernels._online import divide

PINVS = ("iterative", "exact", "ridge")
TUNING = {"iterations": "iterative", "rcond": "exact", "ridge": "ridge"}  # the one that each number belongs to


def check_tuning(pinv: str, tuning: Mapping[str, float | None]) -> None:
    """Raise for a number that is out of range or would have no effect."""
    for option, value in tuning.items():
        if value is None:
            continue
        (_arrays.check_count if option == "iterations" else _arrays.check_positive)(option, value)
        if pinv != TUNING[option]:
            kind = TUNING[option]
            msg = f"{option}={value} would have no effect with pinv={pinv!r}; it belongs to pinv={kind!r}"
            raise ValueError(msg)


def pinv_times(xp: ModuleType, a: Array, x: Array, pinv: str, tuning: Mapping[str, float | None]) -> Array:
    """A⁺ X."""
    a_t = xp.matrix_transpose(a)
    if pinv == "ridge":
        gram = a_t @ a + (tuning["ridge"] or 1e-2) * xp.eye(a.shape[-1], dtype=a.dtype, device=device(a))
        return xp.linalg.solve(*_broadcast_pair(xp, gram, a_t @ x))
    if pinv == "exact":
        return xp.linalg.pinv(a, rtol=tuning["rcond"] or 1e-3) @ x
    return _iterative(xp, a, int(tuning["iterations"] or 6)) @ x


def _iterative(xp: ModuleType, a: Array, iterations: int) -> Array:
    """Z ≈ A⁺ by Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z))), from Z = Aᵀ / (‖A‖₁ ‖A‖_∞) of each matrix."""
    magnitude = xp.abs(a)
    norms = xp.max(xp.sum(magnitude, axis=-1, keepdims=True), axis=-2, keepdims=True) * xp.max(
        xp.sum(magnitude, axis=-2, keepdims=True), axis=-1, keepdims=True
    )
    z = divide(xp, xp.matrix_transpose(a), norms)
    eye = xp.eye(a.shape[-1], dtype=a.dtype, device=device(a))
    seven, fifteen, thirteen = 7 * eye, 15 * eye, 13 * eye
    for _ in range(iterations):
        az = a @ z
        z = z @ (thirteen - az @ (fifteen - az @ (seven - az))) / 4
    return z


def _broadcast_pair(xp: ModuleType, a: Array, b: Array) -> tuple[Array, Array]:
    """Both with the common batch shape, which `solve` does not find by itself on every library."""
    batch = _arrays.broadcast_batch(a=a.shape[:-2], b=b.shape[:-2])
    return xp.broadcast_to(a, (*batch, *a.shape[-2:])), xp.broadcast_to(b, (*batch, *b.shape[-2:]))
