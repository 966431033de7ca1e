"""Sum of a residual stream, dropout and norm in one call, by the names of ``mamba_ssm.ops.triton.layer_norm``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from subquad_torch.mamba_ssm.ops.norms import add_and_norm

__all__ = ["RMSNorm", "layer_norm_fn", "layer_norm_linear_fn", "layer_norm_ref", "rms_norm_fn", "rms_norm_ref"]


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Add what comes to a residual stream, and normalise the sum.

        stream = dropout(rowscale ∘ x) + dropout(x1) + residual
        y = (stream − mean) / √(variance + eps) ∘ weight + bias

    Parameters
    ----------
    x : Tensor, shape (..., d)
        The output of the layer before.
    weight : Tensor, shape (d,)
        Factors after the norm.
    bias : Tensor, shape (d,), or None
        Added after the norm.
    residual : Tensor, shape (..., d), optional
        The stream so far.
    x1 : Tensor, shape (..., d), optional
        The output of a parallel layer; not with `rowscale`.
    weight1, bias1 : Tensor, shape (d,), optional
        A second norm of the same stream, whose output is returned too.
    eps : float, default 1e-6
        Added to the variance.
    dropout_p : float, default 0.0
        Probability that a number of `x` or `x1` becomes 0; the others are divided by 1 − dropout_p. Numbers are drawn
        from PyTorch's generator whenever it is above 0.
    rowscale : Tensor, shape (...), optional
        A factor for each row of `x`.
    prenorm : bool, default False
        Return the stream as well.
    residual_in_fp32 : bool, default False
        Without `residual`: the stream that is returned is float32. With it, the stream keeps its dtype.
    is_rms_norm : bool, default False
        Divide by the root of the mean square, without a mean.
    return_dropout_mask : bool, default False
        Return what dropout kept of `x` and of `x1` as well.

    Returns
    -------
    Tensor or tuple
        y, in the dtype of `x`; then the second output with `weight1`, the stream with `prenorm`, and both masks, None
        where nothing was dropped, with `return_dropout_mask`.

    Raises
    ------
    TypeError, ValueError
        If an argument is no tensor, has another shape than expected, or does not go with the others.
    """
    if not isinstance(dropout_p, int | float) or not 0 <= dropout_p < 1:
        msg = f"dropout_p is {dropout_p!r}, expected a number from 0 to below 1"
        raise ValueError(msg)
    masks = []
    for a in (x, x1):
        drops = dropout_p > 0 and a is not None
        masks.append(torch.rand(a.shape, device=a.device) >= dropout_p if drops else None)  # type: ignore[union-attr]
    wide = torch.promote_types(x.dtype, torch.float32) if isinstance(x, Tensor) else torch.float32
    keep = None if residual is not None or not residual_in_fp32 else torch.float32
    outs = add_and_norm(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, masks, wide, keep, is_rms_norm, prenorm
    )
    if return_dropout_mask:
        outs = (*outs, *masks)
    return outs if len(outs) > 1 else outs[0]


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
    *,
    is_rms_norm: bool = True,
) -> Any:
    """`layer_norm_fn` with the root of the mean square in place of mean and variance."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        is_rms_norm, return_dropout_mask,
    )  # fmt: skip


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
    *,
    is_rms_norm: bool = False,
) -> Any:
    """`layer_norm_fn` with dropout masks that are given, in the dtype of `x` unless `upcast`."""
    masks = [
        torch.rand(a.shape, device=a.device) >= dropout_p if mask is None and dropout_p and a is not None else mask
        for a, mask in ((x, dropout_mask), (x1, dropout_mask1))
    ]
    wide = torch.promote_types(x.dtype, torch.float32) if upcast else x.dtype
    outs = add_and_norm(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, masks, wide, wide, is_rms_norm, prenorm
    )
    return outs if len(outs) > 1 else outs[0]


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """`layer_norm_ref` with the root of the mean square in place of mean and variance."""
    return layer_norm_ref(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, dropout_mask, dropout_mask1,
        upcast, is_rms_norm=True,
    )  # fmt: skip


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """A linear map of the output of `layer_norm_fn`; with `prenorm`, (out, stream)."""
    y, stream = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=True, residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )  # fmt: skip
    out = functional.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, stream) if prenorm else out


class RMSNorm(torch.nn.Module):
    """A root-mean-square norm that adds the residual stream before.

    Parameters
    ----------
    hidden_size : int
        Number of channels.
    eps : float, default 1e-5
        Added to the mean square.
    dropout_p : float, default 0.0
        Dropout of the input in training, before the stream is added.
    device, dtype : optional
        Those of the weight.
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        torch.nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """The norm of x + residual, and with `prenorm` this sum, as `rms_norm_fn` gives them."""
        return rms_norm_fn(
            x, self.weight, self.bias, residual, eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip
