"""A⁺ of small square matrices by the third-order iteration of Xiong et al. (2021), eq. (17).

Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z))),    starting from Z = Aᵀ / (‖A‖₁ ‖A‖_∞), matrix by matrix
"""

from __future__ import annotations

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.kernel import kernel
from subquad.kernels.max_shift import divide_or_zero


def outputs(a: Array, /, *, iterations: int) -> tuple[Like, ...]:
    """Shape and dtype of the output of `iterative_pinv`."""
    return (Like(tuple(a.shape), a.dtype),)


@kernel(outputs=outputs)
def iterative_pinv(a: Array, /, *, iterations: int) -> Array:
    """Z ≈ A⁺ of finite matrices A (..., m, m) after that number of iterations; shape and dtype of A. A = 0 gives 0."""
    xp = namespace_of(a)
    magnitude = xp.abs(a)
    norms = xp.max(xp.sum(magnitude, axis=-1, keepdims=True), axis=-2, keepdims=True) * xp.max(
        xp.sum(magnitude, axis=-2, keepdims=True), axis=-1, keepdims=True
    )
    z = divide_or_zero(xp, xp.matrix_transpose(a), norms)
    eye = xp.eye(a.shape[-1], dtype=a.dtype, device=place_of(a))
    seven, fifteen, thirteen = 7 * eye, 15 * eye, 13 * eye
    for _ in range(iterations):
        az = a @ z
        z = z @ (thirteen - az @ (fifteen - az @ (seven - az))) / 4
    return z
