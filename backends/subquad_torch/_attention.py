"""Softmax attention by torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from subquad.kernels.softmax_attention import softmax_attention as dispatched_attention
from subquad_torch._plain import declines_orders, differentiate_again, is_eager, sees_through

generic_attention = dispatched_attention.__wrapped__  # type: ignore[attr-defined]
# A mask over queries × keys is an array of that size: beyond this many entries the blocked form is better.
MASK_ENTRIES = 2**24
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # since PyTorch 2.7
VECTOR = 16  # numbers in the longest vector of a CPU: of fewer logits, and no mask, its kernel takes NaN for −∞


def declines(
    q: Tensor, k: Tensor, v: Tensor, /, *, scale: float, causal: bool = False, key_mask: Tensor | None = None
) -> str | None:
    """Why the fused attention cannot take the call."""
    n, n_kv = q.shape[-2], k.shape[-2]
    if 0 in (*q.shape, *k.shape, *v.shape, *(() if key_mask is None else key_mask.shape)):
        return "an axis is empty"
    entries = (1 if key_mask is None else key_mask[..., 0].numel()) * n * n_kv
    if causal and (n != n_kv or key_mask is not None) and entries > MASK_ENTRIES:
        return f"it would need a mask of {entries} entries, n × n_kv = {n} × {n_kv} for each item of key_mask"
    return declines_orders([q, k, v])


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, /, *, scale: float, causal: bool = False, key_mask: Tensor | None = None
) -> Tensor:
    """The kernel `softmax_attention`: causal is aligned at the end, hidden keys and values are not even read."""
    n, n_kv = q.shape[-2], k.shape[-2]
    if scale <= 0:  # the fused kernels take −∞ times the scale for a hidden key
        q, scale = q * scale, 1.0
    short = q.device.type == "cpu" and not exporting() and n_kv < VECTOR  # a program has one form for all lengths
    is_causal = causal and n == n_kv and key_mask is None and not short
    mask = seen = poison = None
    if key_mask is not None:
        keep = key_mask[..., None]
        k, v = torch.where(keep, k, 0.0), torch.where(keep, v, 0.0)  # 0 · NaN is NaN: hide the values as well
        mask = key_mask[..., None, :]
    if causal:
        # the fused kernels multiply hidden values by 0: one that is not finite is taken out and put back by hand
        if not (_can_read([k, v]) and _surely_finite(k, v)):
            bad = ~(torch.isfinite(k).all(-1, keepdim=True) & torch.isfinite(v).all(-1, keepdim=True))
            k, v = torch.where(bad, 0.0, k), torch.where(bad, 0.0, v)
            poison = _reached(bad, n)
        if not is_causal:
            position = torch.arange(n_kv, device=q.device)
            visible = position <= torch.arange(n, device=q.device)[:, None] + (n_kv - n)
            mask = visible if mask is None else mask & visible
    if mask is not None:
        seen = mask.any(-1, keepdim=True)
        mask = mask | ~seen  # a row of only hidden keys would be 0/0; it is set to 0 below
    elif short:
        mask = torch.ones((1, n_kv), dtype=torch.bool, device=q.device)
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], () if mask is None else mask.shape[:-2])
    # the fused kernels take exactly four axes
    queries, keys, values = (
        x.expand(*batch, *x.shape[-2:]).reshape(-1, *(batch[-1:] or (1,)), *x.shape[-2:]) for x in (q, k, v)
    )
    if mask is not None:
        mask = mask.expand(*batch, *mask.shape[-2:]).reshape(-1, *(batch[-1:] or (1,)), *mask.shape[-2:])
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal, scale=scale)
    out = out.reshape(*batch, n, v.shape[-1])
    if out.requires_grad and is_eager([q, k, v]):
        out = DifferentiableAgain.apply(out, {"scale": scale, "causal": causal}, key_mask, q, k, v)  # type: ignore[no-untyped-call]
    if seen is not None:
        out = torch.where(seen, out, 0.0)
    return out if poison is None else torch.where(poison, torch.nan, out)


class DifferentiableAgain(torch.autograd.Function):
    """The attention `out` of q, k and v itself, with PyTorch's gradient; one to go on with is the generic form's."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, options: dict[str, Any], key_mask: Tensor | None, *floats: Tensor) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(key_mask, *floats)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if not sees_through(grad, operator=True):
            return grad, *5 * [None]
        key_mask, *floats = ctx.saved_tensors
        again = partial(generic_attention, key_mask=key_mask, **ctx.options)
        return None, None, None, *differentiate_again(again, floats, ctx.needs_input_grad[3:], grad)


def _can_read(tensors: list[Tensor]) -> bool:
    """May one look at values, and for free: on the CPU, where nothing watches?"""
    return is_eager(tensors) and tensors[0].device.type == "cpu" and not torch._C._len_torch_dispatch_stack()


def _surely_finite(*tensors: Tensor) -> bool:
    """Is every number finite? False also where finite ones have a sum beyond the range.

    A finite sum is one of finite numbers; to look at each number costs ten times as much.
    """
    return all(math.isfinite(x.detach().sum()) for x in tensors)


def _reached(bad: Tensor, n: int) -> Tensor:
    """Which of n rows see a key that is `bad`: (..., n_kv, 1) → (..., n, 1)."""
    n_kv = bad.shape[-2]
    reached = bad.to(torch.int32).cumsum(-2) > 0
    if n <= n_kv:
        return reached[..., n_kv - n :, :]
    early = torch.zeros((*bad.shape[:-2], n - n_kv, 1), dtype=torch.bool, device=bad.device)
    return torch.cat([early, reached], dim=-2)
