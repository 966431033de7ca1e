"""Norms beside a gate, by the names of ``mamba_ssm.ops.triton.layernorm_gated``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from subquad_torch.layouts import Layout
from subquad_torch.mamba_ssm.ops.norms import check_norm, normalise

__all__ = ["LayerNorm", "RMSNorm", "layernorm_fn", "rms_norm_ref", "rmsnorm_fn"]


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Normalise and gate.

        y = norm(x) ∘ weight + bias, times silu(z)        with norm_before_gate
        y = norm(x silu(z)) ∘ weight + bias               without

    Parameters
    ----------
    x : Tensor, shape (..., d)
        Input.
    weight : Tensor, shape (d,)
        Factors after the norm.
    bias : Tensor, shape (d,), or None
        Added after the norm.
    z : Tensor, shape (..., d), optional
        Gate. Default: none.
    eps : float, default 1e-6
        Added to the variance.
    group_size : int, optional
        How many channels are normalised together; it divides d. Default: all.
    norm_before_gate : bool, default True
        Which of the two.
    is_rms_norm : bool, default False
        Divide by the root of the mean square, without a mean.

    Returns
    -------
    Tensor, shape (..., d)
        The output, in the dtype of `x`; computed in float32 at least.

    Raises
    ------
    TypeError, ValueError
        If an argument is no tensor or has another shape than expected, or `group_size` does not divide d.
    """
    wide = torch.promote_types(x.dtype, torch.float32) if isinstance(x, Tensor) else None
    return _gated(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, wide).to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`layernorm_fn` with the root of the mean square in place of mean and variance."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """`rmsnorm_fn`, in the dtype of `x` unless `upcast`."""
    wide = torch.promote_types(x.dtype, torch.float32) if upcast else x.dtype
    return _gated(x, weight, bias, z, eps, group_size, norm_before_gate, True, wide).to(x.dtype)


class LayerNorm(torch.nn.Module):
    """A gated norm by mean and variance, as `layernorm_fn` computes it.

    Parameters
    ----------
    hidden_size : int
        Number of channels.
    eps : float, default 1e-5
        Added to the variance.
    group_size : int, optional
        How many channels are normalised together. Default: all.
    norm_before_gate : bool, default True
        Whether the gate is outside of the norm.
    device, dtype : optional
        Those of the parameters.
    """

    is_rms_norm = False

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, group_size: int | None = None, norm_before_gate: bool = True,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = None if self.is_rms_norm else torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0."""
        torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """The norm of `x`, gated by `z`."""
        return layernorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm
        )


class RMSNorm(LayerNorm):
    """A gated norm by the mean square, as `rmsnorm_fn` computes it: a `LayerNorm` without mean and bias."""

    is_rms_norm = True


def _gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, eps: float, group_size: int | None,
    norm_before_gate: bool, rms: bool, wide: torch.dtype | None,
) -> Tensor:  # fmt: skip
    check_norm(Layout(), x, weight, bias, z=z)
    size = x.shape[-1] if group_size is None else group_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or x.shape[-1] % size:
        msg = f"group_size is {group_size!r}, expected a divisor of the {x.shape[-1]} channels of x"
        raise ValueError(msg)
    y, gate = x.to(wide), None if z is None else functional.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        y = y * gate
    y = normalise(y, weight, bias, eps, rms=rms, group_size=size)
    return y * gate if gate is not None and norm_before_gate else y
