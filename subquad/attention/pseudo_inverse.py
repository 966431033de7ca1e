"""A⁺ X for the small square matrices A of Nyström attention, in three ways, and the options of all values of `pinv`.

- "iterative": the kernel `iterative_pinv`, with `iterations` steps (6)
- "exact": the singular value decomposition; values below `rcond` (1e-3) times the largest count as 0
- "ridge": (AᵀA + λ I)⁻¹ Aᵀ X, with λ = `ridge` (0.01)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_count, check_positive
from subquad.core.decompositions import decomposition, pseudo_inverse
from subquad.core.shapes import broadcast_batch
from subquad.kernels.iterative_pinv import iterative_pinv

PSEUDO_INVERSES = ("iterative", "exact", "ridge", "ridge-fit")
INSTEAD = 'take pinv="iterative"'
# option → the values of `pinv` that use it
OPTION_OF = {"iterations": ("iterative",), "rcond": ("exact",), "ridge": ("ridge", "ridge-fit")}


def check_pinv_options(pinv: str, tuning: Mapping[str, float | None]) -> None:
    """Raise TypeError or ValueError for a number of the wrong type, out of range, or without effect for this `pinv`."""
    for option, value in tuning.items():
        if value is None:
            continue
        (check_count if option == "iterations" else check_positive)(option, value)
        if pinv not in OPTION_OF[option]:
            kinds = " and ".join(map(repr, OPTION_OF[option]))
            msg = f"{option}={value} would have no effect with pinv={pinv!r}; it belongs to pinv={kinds}"
            raise ValueError(msg)


def pinv_times(xp: ModuleType, a: Array, x: Array, pinv: str, tuning: Mapping[str, float | None]) -> Array:
    """A⁺ X of `a` (..., m, m) and `x` (..., m, d_v), computed as `pinv` says; None in `tuning` means the default."""
    if pinv == "ridge":
        a_t = xp.matrix_transpose(a)
        gram = a_t @ a + float(tuning["ridge"] or 1e-2) * xp.eye(a.shape[-1], dtype=a.dtype, device=place_of(a))
        return decomposition(xp, "solve", a, INSTEAD)(*_broadcast_pair(xp, gram, a_t @ x))
    if pinv == "exact":
        return pseudo_inverse(xp, a, float(tuning["rcond"] or 1e-3), INSTEAD) @ x
    return iterative_pinv(a, iterations=int(tuning["iterations"] or 6)) @ x


def _broadcast_pair(xp: ModuleType, a: Array, b: Array) -> tuple[Array, Array]:
    """`a` and `b` broadcast to their common batch shape, since `solve` does not broadcast on every library."""
    batch = broadcast_batch(a=a.shape[:-2], b=b.shape[:-2])
    return xp.broadcast_to(a, (*batch, *a.shape[-2:])), xp.broadcast_to(b, (*batch, *b.shape[-2:]))
