"""Softmax attention by torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from subquad.backend import Accepts, Call, Conditions, Override
from subquad.core.override import PLAIN
from subquad.kernels import softmax_attention
from subquad.kernels.visibility import CAUSAL, Visibility
from subquad_numpy.conditions import BOTH, few_rows
from subquad_torch.conditions import holds, is_eager, is_recorded, needs_generic, transforms
from subquad_torch.generic import differentiate_generic

# Maximum entries of a mask over queries × keys, which is an array: with more, the blocked form is better.
MASK_ENTRIES = 2**24
RECORDED = Conditions(recorded=True)
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # since PyTorch 2.7
# Numbers in the longest vector of a CPU. In rows of fewer logits, unless masked, PyTorch's CPU kernel takes NaN for −∞.
VECTOR = 16
# PyTorch's CPU product adds one term after the other along a long inner axis, if it has few rows.
FEW, LONG = 16, 2**15


def left(call: Call) -> str | None:
    """Why the compiled attention leaves a call to PyTorch's, or None where it takes it.

    It takes calls with few rows, see `few_rows`; and where PyTorch's products are slow, all others that are not traced.
    """
    reason = few_rows(call, holds=holds)
    if reason is None or call.conditions not in (PLAIN, RECORDED) or call.arrays[0].device.type != "cpu":
        return reason
    fewest, least = min(x.shape[-2] for x in call.arrays[:2]), BOTH[0] if call.conditions == PLAIN else BOTH[1]
    return None if fewest >= least and products_are_slow() else reason


@cache
def products_are_slow() -> bool:
    """Whether PyTorch's products are Intel's on a processor of AMD, on which ours take .4 to .9 of their time."""
    from subquad_numpy.codegen import processor

    return torch.backends.mkl.is_available() and processor.name().startswith("znver")


def declines(call: Call) -> str | None:
    """Why the fused attention cannot take the call."""
    tensors: tuple[Any, ...] = call.arrays
    (q, k, v), key_mask, visible = tensors, call.key_mask, call.static["visible"]
    n, n_kv, on_cpu = q.shape[-2], k.shape[-2], q.device.type == "cpu"
    if visible is not None and visible != CAUSAL:
        return f"it has no {visible} form"
    if on_cpu and holds(n_kv > LONG) and holds(n < FEW):
        return f"it loses digits in sums over more than {LONG} keys for fewer than {FEW} queries"
    if on_cpu and not _flash_is_on():
        return "PyTorch's flash attention is switched off, and its other form holds all logits at once"
    if 0 in (*q.shape, *k.shape, *v.shape, *(() if key_mask is None else key_mask.shape)):
        return "an axis is empty"
    entries = (1 if key_mask is None else key_mask[..., 0].numel()) * n * n_kv
    if visible is not None and (n != n_kv or key_mask is not None) and entries > MASK_ENTRIES:
        return f"it would need a mask of {entries} entries, n × n_kv = {n} × {n_kv} for each item of key_mask"
    if transforms().count("Grad") > 1:
        return "functional second derivatives see through the generic form only"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /,
    *,
    scale: float,
    visible: Visibility | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The kernel `softmax_attention`; causal rows are aligned at the end, and hidden keys have no effect, even NaN."""
    n, n_kv, causal = q.shape[-2], k.shape[-2], visible is not None
    if scale <= 0:  # the fused kernels multiply the −∞ of a hidden key by the scale
        q, scale = q * scale, 1.0
    # rows that need a mask, see `VECTOR`; an exported program cannot ask, since it serves all lengths
    short = q.device.type == "cpu" and not exporting() and n_kv < VECTOR
    is_causal = causal and n == n_kv and key_mask is None and not short
    mask = seen = poison = None
    if key_mask is not None:
        keep = key_mask[..., None]
        k, v = torch.where(keep, k, 0.0), torch.where(keep, v, 0.0)  # 0 · NaN is NaN: hide the values as well
        mask = key_mask[..., None, :]
    if causal:
        # The fused kernels multiply hidden values by 0, and 0 · NaN is NaN. Keys and values that are not finite are set
        # to 0 here; rows that see one are set to NaN at the end.
        if not (_can_read([k, v]) and _surely_finite(k, v)):
            bad = ~(torch.isfinite(k).all(-1, keepdim=True) & torch.isfinite(v).all(-1, keepdim=True))
            k, v = torch.where(bad, 0.0, k), torch.where(bad, 0.0, v)
            poison = _reached(bad, n)
        if not is_causal:
            position = torch.arange(n_kv, device=q.device)
            sees = position <= torch.arange(n, device=q.device)[:, None] + (n_kv - n)
            mask = sees if mask is None else mask & sees
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
    if q.device.type == "cpu":  # the fused kernel takes rows of one width, side by side in memory
        width = max(q.shape[-1], v.shape[-1])
        queries, keys, values = (_padded(x, width) for x in (queries, keys, values))
    if mask is not None:
        mask = mask.expand(*batch, *mask.shape[-2:]).reshape(-1, *(batch[-1:] or (1,)), *mask.shape[-2:])
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal, scale=scale)
    out = out[..., : v.shape[-1]].reshape(*batch, n, v.shape[-1])
    if out.requires_grad and is_eager([q, k, v]):
        out = DifferentiableAgain.apply(out, {"scale": scale, "visible": visible}, q, k, v, key_mask)
    if seen is not None:
        out = torch.where(seen, out, 0.0)
    return out if poison is None else torch.where(poison, torch.nan, out)


def _bind(arrays: Sequence[Any], keywords: Mapping[str, Any]) -> Callable[..., Tensor] | None:
    """`Override.bind`: for calls whose tensors the fused attention takes as they are, whatever their values."""
    (q, k, v), scale = arrays, keywords["scale"]
    on_cpu, n_kv = q.device.type == "cpu", k.shape[-2]
    if (keywords.get("visible"), keywords.get("key_mask")) != (None, None) or scale <= 0 or is_recorded(arrays):
        return None
    if q.ndim != 4 or not q.shape[:2] == k.shape[:2] == v.shape[:2] or q.shape[-1] != v.shape[-1]:
        return None
    if on_cpu and n_kv < VECTOR:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, *, key_mask: None = None) -> Tensor:
        if q.is_contiguous() and k.is_contiguous() and v.is_contiguous():
            return scaled_dot_product_attention(q, k, v, scale=scale)
        return attend(q, k, v, **keywords)

    return run


def _padded(x: Tensor, width: int) -> Tensor:
    """x with zeros up to `width` columns, and rows whose numbers lie side by side."""
    if x.shape[-1] < width:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


class DifferentiableAgain(torch.autograd.Function):
    """The identity of `out`, the attention of q, k and v.

    A first gradient passes through to PyTorch's fused attention, which has no second derivatives. A gradient that is to
    be differentiated again is that of the generic form instead.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, static: dict[str, Any], *arrays: Tensor | None) -> Tensor:
        ctx.static = static
        ctx.save_for_backward(*arrays)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.compiler.is_compiling() or not needs_generic([grad]):
            return grad, None, None, None, None, None
        need = ctx.needs_input_grad[2:]
        return None, None, *differentiate_generic(softmax_attention, ctx.saved_tensors, ctx.static, [grad], need)


@torch.compiler.assume_constant_result
def _flash_is_on() -> bool:
    """Whether the program lets PyTorch use its fused kernel; the switch has the name of CUDA, but is for CPUs too."""
    return torch.backends.cuda.flash_sdp_enabled()


def _can_read(tensors: list[Tensor]) -> bool:
    """Whether values can be read without cost: on the CPU, while nothing is traced or watched."""
    return is_eager(tensors) and tensors[0].device.type == "cpu" and not torch._C._len_torch_dispatch_stack()


def _surely_finite(*tensors: Tensor) -> bool:
    """True only if every number is finite; False also where the sum of finite numbers overflows.

    A finite sum has finite terms only; to look at each number costs ten times as much as the sum.
    """
    return all(math.isfinite(x.detach().sum()) for x in tensors)


def _reached(bad: Tensor, n: int) -> Tensor:
    """Whether each of n causal rows sees a key that is `bad`: (..., n_kv, 1) → (..., n, 1)."""
    n_kv = bad.shape[-2]
    reached = bad.to(torch.int32).cumsum(-2) > 0
    if n <= n_kv:
        return reached[..., n_kv - n :, :]
    early = torch.zeros((*bad.shape[:-2], n - n_kv, 1), dtype=torch.bool, device=bad.device)
    return torch.cat([early, reached], dim=-2)


OVERRIDE = Override(
    "softmax_attention",
    "sdpa",
    attend,
    Accepts(  # not half precision, whose weights PyTorch rounds before it sums values
        devices=(),
        options=frozenset({"visible", "key_mask"}),
        under=frozenset({"tracing", "transformed", "recorded", "watched"}),
        also=declines,
    ),
    _bind,
)
