"""A kernel with a compiled gradient as a function of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from subquad_torch import operators
from subquad_torch.conditions import is_batch, is_watched, needs_generic
from subquad_torch.generic import differentiate_generic
from subquad_torch.keywords import decode
from subquad_torch.native import Arrays, Native, Static, kernel_of, native_of


def meets_operator(arrays: Arrays) -> bool:
    """Whether a call must go through PyTorch's dispatcher."""
    like = arrays[0]
    assert like is not None
    return torch.compiler.is_compiling() or like.is_meta or is_watched()


class Recorded(torch.autograd.Function):
    """A kernel with a compiled gradient; second derivatives are those of the generic form."""

    @staticmethod
    def forward(ctx: Any, kernel: str, keywords: Static | str, *arrays: Tensor | None) -> tuple[Tensor, ...]:
        """The outputs; while compiling the keywords are a text."""
        native, left, first = native_of(kernel, arrays), None, 0
        if meets_operator(arrays):
            outputs = operators.forward(kernel, arrays, keywords)
            first = len(arrays)  # the operator asks each array for the shape of its gradient
        else:
            outputs, left = native.forward(arrays, keywords, save=True)
        ctx.kernel, ctx.keywords, ctx.count, ctx.left = kernel, keywords, len(arrays), left
        ctx.set_materialize_grads(False)
        if native.unaided:
            ctx.mark_non_differentiable(*[outputs[i] for i in native.unaided])
        kept = [None if i in native.unread and i >= first else x for i, x in enumerate((*arrays, *outputs))]
        ctx.save_for_backward(*kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved, need, keywords = ctx.saved_tensors, ctx.needs_input_grad[2:], ctx.keywords
        arrays, outputs = saved[: ctx.count], saved[ctx.count :]
        native, found = native_of(ctx.kernel, arrays), None
        if torch.compiler.is_compiling():
            if any(needed and x is None for x, needed in zip(arrays, need, strict=True)):  # the forward pass was eager
                found = kernel_of(ctx.kernel).gradient(arrays, outputs, grads, **keywords)
            else:
                found = operators.backward(ctx.kernel, arrays, keywords, outputs, grads, need)
            return None, None, *(by if needed else None for by, needed in zip(found, need, strict=True))
        if all(by is None for by in grads):
            return (None,) * len(ctx.needs_input_grad)
        static = decode(keywords) if isinstance(keywords, str) else keywords

        def pull(grads: Arrays) -> Sequence[Tensor | None]:
            found = None
            if (native.watched or not is_watched()) and not needs_generic(grads):
                found = _pull(native, arrays, static, ctx.left, outputs, grads, need)
            if found is None:
                found = differentiate_generic(kernel_of(ctx.kernel), arrays, static, grads, need, outputs)
            return found

        return None, None, *(_row_by_row(pull, grads) if any(map(is_batch, grads)) else pull(grads))


def _pull(
    native: Native, arrays: Arrays, static: Static, left: Any, outputs: Arrays, grads: Arrays, need: Sequence[bool]
) -> Sequence[Tensor | None] | None:
    """Compiled gradients by the arrays, from gradients that are plain tensors; None where they cannot be computed."""
    if meets_operator(arrays):
        return operators.backward(native.kernel, arrays, static, outputs, grads, need)
    assert native.backward is not None
    return native.backward(arrays, static, left, outputs, grads, need)


def _row_by_row(pull: Callable[[Arrays], Arrays], grads: Arrays) -> list[Tensor | None]:
    """Gradients by a batch of gradients (is_grads_batched=True), an axis that no shape shows."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    shown = [torch._remove_batch_dim(x, level, 1, 0) if x is not None and is_batch(x) else x for x in grads]
    count = next(len(x) for x, y in zip(shown, grads, strict=True) if x is not None and is_batch(y))
    rows = [
        pull([x[i] if x is not None and is_batch(y) else x for x, y in zip(shown, grads, strict=True)])
        for i in range(count)
    ]
    return [
        None if by[0] is None else torch._add_batch_dim(torch.stack(by), 0, level) for by in zip(*rows, strict=True)
    ]
