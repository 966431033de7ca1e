"""The linear algebra of the Array API standard on tensors of Paddle."""

from __future__ import annotations

from typing import Any

import paddle
from paddle.linalg import eigh, inv, solve

__all__ = ["eigh", "inv", "pinv", "solve"]


def pinv(x: Any, *, rtol: float | None = None) -> Any:
    """Pseudo-inverses of matrices, by the singular values above rtol times the largest one."""
    rtol = max(x.shape[-2:]) * paddle.finfo(x.dtype).eps if rtol is None else rtol
    return paddle.linalg.pinv(x, rcond=rtol)
