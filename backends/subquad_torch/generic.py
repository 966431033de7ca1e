"""Gradients of the generic form of a kernel, where its compiled gradient cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.core.kernel import Kernel
from subquad_torch.native import Arrays, Static


def differentiate_generic(
    kernel: Kernel,
    arrays: Arrays,
    static: Static,
    grads: Arrays,
    need: Sequence[bool],
    outputs: Arrays | None = None,
) -> list[Tensor | None]:
    """Gradients of the generic form by the arrays that need one, differentiable themselves while grad mode is on.

    Each array is cut from its own history first, so that arrays computed from one another are not counted twice.
    `outputs` are those of an override: values that the override was free to choose, like a shift, are kept.
    """
    if kernel.gradient is not None and outputs is not None:
        found = kernel.gradient(tuple(arrays), outputs, grads, **static)
        return [by if needed else None for by, needed in zip(found, need, strict=True)]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [None if x is None else _cut(x, needed) for x, needed in zip(arrays, need, strict=True)]
        computed = _generic(kernel, own, static, outputs)
    wanted = [x for x, needed in zip(own, need, strict=True) if needed]
    pairs = [(out, by) for out, by in zip(computed, grads, strict=True) if by is not None and out.requires_grad]
    results, given = [out for out, _ in pairs], [by for _, by in pairs]
    pulled = iter(
        torch.autograd.grad(results, wanted, given, create_graph=create_graph, allow_unused=True)
        if pairs
        else [None for _ in wanted]
    )
    return [or_zero(next(pulled), x) if needed else None for x, needed in zip(arrays, need, strict=True)]


def _cut(x: Tensor, needed: bool) -> Tensor:
    """A tensor with the values of x, to differentiate by; inside an operator x itself does not require a gradient."""
    return x.detach().requires_grad_() if needed and not x.requires_grad else x.view_as(x)


def _generic(kernel: Kernel, arrays: list[Any], static: Static, outputs: Arrays | None) -> tuple[Tensor, ...]:
    """The outputs by the generic form."""
    keywords = dict(static)
    if "key_mask" in kernel.options:
        *arrays, keywords["key_mask"] = arrays
    if kernel.pinned is not None and outputs is not None:
        return kernel.pinned(tuple(arrays), outputs, **keywords)
    found = kernel.generic(*arrays, **keywords)
    return found if isinstance(found, tuple) else (found,)


def or_zero(grad: Tensor | None, x: Tensor | None) -> Tensor:
    """The gradient by x, as zeros where nothing depends on x."""
    assert x is not None
    return torch.zeros_like(x) if grad is None else grad
