"""What swapped attention cores have in common: heads, key masks, and the refusal of what subquad cannot do."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from subquad_torch.transformers.accelerate.swap import Swapped


class AttentionCore(Swapped):
    """Attention of a model whose code does not ask transformers' registry for a function."""

    needs: ClassVar[tuple[str, ...]] = ("attention_mask", "output_attentions")
    training: bool

    def subquad_check(self, dropout: float, output_attentions: Any) -> None:
        """NotImplementedError for dropout of weights, and for weights, which are never a matrix."""
        name = self.original.__name__
        if dropout and self.training:
            msg = (
                f"{name}: dropout={dropout} of attention weights in training, and subquad has no matrix of weights to "
                f"drop from; set the config's dropout of attention to 0, or restore(model)"
            )
            raise NotImplementedError(msg)
        if output_attentions:
            msg = f"{name}: output_attentions=True, and subquad has no matrix of weights; restore(model) has them"
            raise NotImplementedError(msg)


def heads(x: Tensor, count: int) -> Tensor:
    """(batch, n, heads · d) as (batch, heads, n, d)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(out: Tensor) -> Tensor:
    """(batch, heads, n, d) as (batch, n, heads · d)."""
    return out.transpose(1, 2).flatten(-2)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """True = keep, (batch, 1, n), of a mask (batch, 1, n or 1, n), bool or additive, with equal rows."""
    if mask is None:
        return None
    row = mask[:, :, 0]
    return row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
