"""What ONNX has no operators for: each function says so."""

from __future__ import annotations

from typing import Any

WHY = 'ONNX has no operator for {}; take another option, such as pinv="iterative" of Nystrom'


def _missing(name: str) -> Any:
    def function(*args: Any, **options: Any) -> Any:
        raise NotImplementedError(WHY.format(name))

    return function


pinv, solve, inv, eigh, svd, qr = map(
    _missing, ("pseudo-inverses", "linear systems", "inverses", "eigenvalues", "singular values", "orthogonalisation")
)
