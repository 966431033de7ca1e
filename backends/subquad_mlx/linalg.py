"""The linear algebra of the Array API standard on MLX arrays; MLX computes it on the CPU alone."""

from __future__ import annotations

import mlx.core as mx


def eigh(x: mx.array) -> tuple[mx.array, mx.array]:
    """Eigenvalues and eigenvectors of symmetric matrices."""
    return mx.linalg.eigh(x, stream=mx.cpu)


def inv(x: mx.array) -> mx.array:
    """Inverses of matrices."""
    return mx.linalg.inv(x, stream=mx.cpu)


def solve(a: mx.array, b: mx.array) -> mx.array:
    """The solutions x of a x = b."""
    return mx.linalg.solve(a, b, stream=mx.cpu)


def pinv(x: mx.array, *, rtol: float | None = None) -> mx.array:
    """Pseudo-inverses of matrices, by the singular values above rtol times the largest one."""
    u, s, vt = mx.linalg.svd(x, stream=mx.cpu)
    rtol = max(x.shape[-2:]) * mx.finfo(x.dtype).eps if rtol is None else rtol
    keep = s > rtol * mx.max(s, axis=-1, keepdims=True)
    inverse = mx.where(keep, 1 / mx.where(keep, s, 1), 0)
    r = s.shape[-1]
    return mx.swapaxes(vt[..., :r, :], -1, -2) @ (inverse[..., None] * mx.swapaxes(u[..., :r], -1, -2))
