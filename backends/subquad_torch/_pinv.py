"""Pseudo-inverses by iteration: one compiled call in place of four products per step, where no gradient is due."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad_numpy import _kernels
from subquad_torch._plain import declines_compiled, in_place


def declines(a: Tensor, /, *, iterations: int) -> str | None:
    """Why the compiled iteration cannot take the call."""
    if torch.is_grad_enabled() and a.requires_grad:
        return "gradients are recorded through the generic form"
    return declines_compiled([a], None) or _kernels.iterative_pinv_declines(in_place(a), iterations=iterations)


def iterative_pinv(a: Tensor, /, *, iterations: int) -> Tensor:
    """The kernel `iterative_pinv`."""
    from subquad_numpy.iterative_pinv.calls import iterative_pinv as compiled
    from subquad_torch._threads import threads

    return torch.from_numpy(compiled(in_place(a), iterations=iterations, threads=threads()))
