"""Softmax attention of many queries to few keys, or of few queries to many keys, by the compiled CPU kernels.

The two halves of Nyström attention. Numbers in the cache of a core, not weights, are what these shapes are made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.kernels.softmax_attention import softmax_attention as dispatched_attention
from subquad_torch._plain import declines_compiled, differentiate_again, in_place, sees_through

generic_attention = dispatched_attention.__wrapped__  # type: ignore[attr-defined]
KEYS, QUERIES = range(16, 513), range(16, 257)  # fewer are less than a vector; more do not stay in a cache
FEW = ((KEYS, "keys", "queries"), (QUERIES, "queries", "keys"))


def declines(
    q: Tensor, k: Tensor, v: Tensor, /, *, scale: float, causal: bool = False, key_mask: Tensor | None = None
) -> str | None:
    """Why the compiled attention cannot take the call."""
    if torch.compiler.is_compiling():
        return "a compiler sees through the generic form"  # and knows no ranges of sizes that vary
    n, n_kv = q.shape[-2], k.shape[-2]
    if causal:
        return "it has no causal form"
    if not (n_kv in KEYS and n > KEYS[-1]) and not (n in QUERIES and n_kv > QUERIES[-1]):
        few = " or ".join(f"{x[0]} to {x[-1]} {name} and more {of}" for x, name, of in FEW)
        return f"it is for {few}"
    return declines_compiled([q, k, v], key_mask)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, /, *, scale: float, causal: bool = False, key_mask: Tensor | None = None
) -> Tensor:
    """The kernel `softmax_attention`, not causal."""
    return SoftmaxAttention.apply(scale, key_mask, q, k, v)  # type: ignore[no-untyped-call, no-any-return]


class SoftmaxAttention(torch.autograd.Function):
    """Attention whose backward is compiled too; differentiated once more, it takes the generic form."""

    @staticmethod
    def forward(ctx: Any, scale: float, key_mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from subquad_numpy.features import calls as features
        from subquad_torch._threads import threads

        mask_batch = () if key_mask is None else key_mask.shape[:-1]
        batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], mask_batch)
        out = q.new_empty((*batch, q.shape[-2], v.shape[-1]))  # torch's memory, so that torch accounts for it
        _, ctx.sums = features.softmax_and_sums(
            *map(in_place, (q, k, v)), scale=scale, key_mask=in_place(key_mask), threads=threads(), out=in_place(out)
        )
        ctx.scale = scale
        ctx.save_for_backward(key_mask, out, q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        key_mask, out, *floats = ctx.saved_tensors
        need = ctx.needs_input_grad[2:]
        if sees_through(grad):

            def again(*floats: Tensor) -> Tensor:
                return generic_attention(*floats, scale=ctx.scale, key_mask=key_mask)  # type: ignore[no-any-return]

            return None, None, *differentiate_again(again, floats, need, grad)
        from subquad_numpy.features.gradient_calls import softmax_attention_gradient
        from subquad_torch._threads import threads

        found = softmax_attention_gradient(
            *map(in_place, floats), ctx.sums, in_place(out), in_place(grad),
            scale=ctx.scale, key_mask=in_place(key_mask), threads=threads(),
        )  # fmt: skip
        return (
            None,
            None,
            *(
                torch.from_numpy(by).sum_to_size(x.shape) if needed else None
                for by, x, needed in zip(found, floats, need, strict=True)
            ),
        )
