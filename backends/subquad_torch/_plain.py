"""Plain tensors: which of them an operator without autograd formula may take, and their memory as NumPy arrays."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def declines_plain(tensors: Sequence[Tensor]) -> str | None:
    """Why an operator cannot take the tensors: those of a transform, with a tangent, or of a subclass."""
    if torch.compiler.is_compiling():
        return None  # the operator is a node of the graph
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        return "functional transforms see through the generic form only"
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return "forward-mode differentiation sees through the generic form only"  # the tangent would be lost
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return f"it takes plain tensors, got {[type(x).__name__ for x in tensors]}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has(package: str) -> bool:
    """Is it installed? Asked while compiling too."""
    return importlib.util.find_spec(package) is not None


def as_numpy(x: Tensor | None) -> Any:
    """The tensor's memory as a NumPy array."""
    return None if x is None else x.detach().contiguous().resolve_conj().resolve_neg().numpy()
