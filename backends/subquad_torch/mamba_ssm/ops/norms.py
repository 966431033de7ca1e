"""What the norms share: the sum of a stream, the norm of its rows, and the checks of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from subquad_torch.layouts import Layout


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, rms: bool, group_size: int = 0) -> Tensor:
    """The norm of each row of `x`, or of each `group_size` numbers of it, in the dtype that x and weight promote to."""
    compute = torch.promote_types(x.dtype, weight.dtype)
    size = group_size or x.shape[-1]
    parts = x.to(compute).unflatten(-1, (-1, size))
    parts = functional.rms_norm(parts, (size,), eps=eps) if rms else functional.layer_norm(parts, (size,), eps=eps)
    y = parts.flatten(-2) * weight
    return y if bias is None else y + bias


def add_and_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, x1: Tensor | None,
    weight1: Tensor | None, bias1: Tensor | None, eps: float, dropout_p: float, rowscale: Tensor | None,
    masks: list[Tensor | None], wide: torch.dtype, kept: torch.dtype | None, rms: bool, prenorm: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """(y, second output, stream) computed in the dtype `wide`; the stream has that of the residual, `kept`, or x."""
    check_norm(Layout(), x, weight, bias, residual=residual, x1=x1, weight1=weight1, bias1=bias1)
    if bias1 is not None and weight1 is None:
        msg = "bias1 is given, expected weight1 beside it: without it there is no second norm"
        raise ValueError(msg)
    if rowscale is not None and (x1 is not None or rowscale.shape != x.shape[:-1]):
        beside = " and no x1 beside it" if x1 is not None else ""
        msg = (
            f"rowscale has shape {tuple(rowscale.shape)}, expected that of the rows of x, {tuple(x.shape[:-1])}{beside}"
        )
        raise ValueError(msg)
    stream = x.to(wide)
    if rowscale is not None:
        stream = stream * rowscale[..., None].to(wide)
    stream = _dropped(stream, masks[0], dropout_p)
    if x1 is not None:
        stream = stream + _dropped(x1.to(wide), masks[1], dropout_p)
    if residual is not None:
        stream = stream + residual.to(wide)
    y = normalise(stream, weight, bias, eps, rms=rms).to(x.dtype)
    second = () if weight1 is None else (normalise(stream, weight1, bias1, eps, rms=rms).to(x.dtype),)
    dtype = residual.dtype if residual is not None else x.dtype if kept is None else kept
    return (y, *second, stream.to(dtype)) if prenorm else (y, *second)


def check_norm(layout: Layout, x: Tensor, weight: Tensor, bias: Tensor | None, **others: Tensor | None) -> None:
    """Raise unless `x` is a tensor with a last axis, vectors have its length, and the other tensors its shape."""
    if not isinstance(x, Tensor) or not x.ndim or not x.is_floating_point():
        found = f"has shape {tuple(x.shape)} and dtype {x.dtype}" if isinstance(x, Tensor) else f"is {x!r}"
        msg = f"x {found}, expected a floating tensor (..., d)"
        raise TypeError(msg)
    layout.sizes["d"], layout.known_from["d"] = x.shape[-1], "x has"
    layout.check("weight", weight, "d")
    layout.check("bias", bias, "d")
    for name, other in others.items():
        if name in ("weight1", "bias1"):
            layout.check(name, other, "d")
        elif other is not None and (not isinstance(other, Tensor) or other.shape != x.shape):
            what = f"has shape {tuple(other.shape)}" if isinstance(other, Tensor) else f"is a {type(other).__name__}"
            msg = f"{name} {what}, expected that of x, {tuple(x.shape)}"
            raise ValueError(msg)


def _dropped(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0.0) / (1 - dropout_p)
