"""What compiled kernels need: LLVM, and the .py files that they are compiled of."""

from __future__ import annotations

from subquad.backend import why_missing

NEEDS = ("llvmlite", "subquad_numpy.llvm", "subquad_numpy.sources")


def why_not_compiled() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    return next((reason for reason in map(why_missing, NEEDS) if reason is not None), None)
