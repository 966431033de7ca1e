"""What is inside of a Mamba block, with time before channels: convolution, projections, selective scan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from subquad.scans import causal_conv1d, selective_scan

Norm = Callable[[Tensor], Tensor] | None


def mix(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Callable[[Tensor], Tensor],
    delta_proj_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    *,
    maps: tuple[Tensor | None, Tensor | None] = (None, None),
    map_biases: tuple[Tensor | None, Tensor | None] = (None, None),
    norms: tuple[Norm, Norm, Norm] = (None, None, None),
    delta_softplus: bool = True,
    history: Tensor | None = None,
    state: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gated output of the scan, the inputs of the convolution, and the last state.

    Parameters
    ----------
    xz : Tensor, shape (batch, seqlen, 2 dim)
        What the first projection gives.
    conv_weight : Tensor, shape (dim, width)
        Taps of the convolution.
    conv_bias : Tensor, shape (dim,), or None
        Its bias.
    x_proj : callable
        The projection to delta and to the maps that are not given.
    delta_proj_weight : Tensor, shape (dim, rank)
        The projection to the step sizes.
    A : Tensor, shape (dim, dstate)
        State matrix, real or complex.
    D, delta_bias : Tensor, shape (dim,), or None
        Skip connection, and bias of the step sizes.
    maps : (Tensor or None, Tensor or None)
        B and C as `subquad.selective_scan` takes them, where `x_proj` does not make them.
    map_biases : (Tensor or None, Tensor or None)
        Added to B and C of `x_proj`.
    norms : (callable or None, callable or None, callable or None)
        Norms of B, C and delta.
    delta_softplus : bool, default True
        Whether softplus is applied to the step sizes.
    history : Tensor, shape (batch, width - 1, dim), optional
        The inputs of the convolution before the first.
    state : Tensor, shape (batch, dim, dstate), optional
        The state before the first step.
    implementation : str, default "auto"
        That of both kernels.

    Returns
    -------
    y : Tensor, shape (batch, seqlen, dim)
        The output.
    x : Tensor, shape (batch, seqlen, dim)
        The inputs of the convolution.
    state : Tensor, shape (batch, dim, dstate)
        The last state.
    """
    x, z = xz.chunk(2, dim=-1)
    u = causal_conv1d(
        x, conv_weight, conv_bias, activation="silu", initial_state=history, implementation=implementation
    )
    low, rank = x_proj(u), delta_proj_weight.shape[1]
    delta = functional.linear(low[..., :rank], delta_proj_weight)
    parts = _maps(low[..., rank:], maps, A)
    B, C = (x if bias is None else x + bias.to(x.dtype) for x, bias in zip(parts, map_biases, strict=True))
    B, C, delta = (x if norm is None else norm(x) for x, norm in zip((B, C, delta), norms, strict=True))
    if A.is_complex():
        B, C = (_complex(x) if given is None else x for x, given in zip((B, C), maps, strict=True))
    y, state = selective_scan(
        u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus, initial_state=state,
        return_state=True, implementation=implementation,
    )  # fmt: skip
    return y, x, state


def _maps(low: Tensor, maps: tuple[Tensor | None, Tensor | None], A: Tensor) -> tuple[Tensor, Tensor]:
    """B and C: those that are given, the others from the numbers after the step sizes."""
    B, C = maps
    each = A.shape[1] * (2 if A.is_complex() else 1)
    return low[..., :each] if B is None else B, low[..., low.shape[-1] - each :] if C is None else C


def _complex(x: Tensor) -> Tensor:
    """Pairs of numbers along the last axis as complex numbers."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.view_as_complex(wide.reshape(*x.shape[:-1], x.shape[-1] // 2, 2))
