"""The scan of Mamba-2 by the names of ``mamba_ssm``: layouts around `subquad.ssd`, which has them already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from subquad_torch.mamba_ssm.ops.split import NO_LIMIT, chunk_scan, split_scan
from subquad_torch.mamba_ssm.ops.ssd_forms import mamba_conv1d_scan_ref, ssd_selective_scan

__all__ = [
    "mamba_chunk_scan",
    "mamba_chunk_scan_combined",
    "mamba_conv1d_scan_ref",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "ssd_chunk_scan_combined_ref",
    "ssd_selective_scan",
]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """Compute the scan of Mamba-2 as ``mamba_ssm`` does, by `subquad.ssd`.

        Δ = clip(softplus(dt + dt_bias), *dt_limit)
        h[t] = exp(Δ[t] A) h[t−1] + Δ[t] x[t] B[t]ᵀ,    out[t] = (h[t] C[t] + D x[t]) silu(z[t])

    Parameters
    ----------
    x : Tensor, shape (batch, seqlen, nheads, headdim)
        Input.
    dt : Tensor, shape (batch, seqlen, nheads)
        Step sizes.
    A : Tensor, shape (nheads,)
        Rates.
    B, C : Tensor, shape (batch, seqlen, ngroups, dstate)
        Input and output maps; head i reads group i // (nheads / ngroups).
    chunk_size : int
        The length of the original's chunks. Results do not depend on it; it must be at least 1.
    D : Tensor, shape (nheads,) or (nheads, headdim), optional
        Skip connection.
    z : Tensor, shape of x, optional
        Gate.
    dt_bias : Tensor, shape (nheads,), optional
        Added to `dt`.
    initial_states : Tensor, shape (batch, nheads, headdim, dstate), optional
        The states before the first step; those of the first document if there is `seq_idx`.
    seq_idx : Tensor of int, shape (batch, seqlen), optional
        Numbers of packed documents: the state starts anew where the number changes.
    cu_seqlens : Tensor of int, shape (num_sequences + 1,), optional
        For a batch of 1: the places where sequences begin, and the end of the last. It says which states are returned
        with `return_varlen_states`; `seq_idx` keeps the sequences apart.
    dt_softplus : bool, default False
        Whether softplus is applied to the step sizes.
    dt_limit : (float, float), default (0, inf)
        Least and greatest step size.
    return_final_states : bool, default False
        Return the states after the last step.
    return_varlen_states : bool, default False
        Return the state at the end of each sequence of `cu_seqlens`, (num_sequences, nheads, headdim, dstate).
    state_dtype : torch.dtype, optional
        Least precision of the states between the original's chunks. Here states are always float32, or float64 for
        float64 inputs; float64 for other inputs raises.

    Returns
    -------
    Tensor, shape of x, or tuple
        The output in the dtype of `x`, and the states that were asked for, final before varlen, at least float32. All
        have gradients.

    Raises
    ------
    TypeError, ValueError
        If an argument is no tensor, has another shape than expected, or an unknown value; the message names it.
    """
    found = chunk_scan(
        x, dt, A, B, C, D, chunk_size=chunk_size, z=z, dt_bias=dt_bias, initial_states=initial_states,
        seq_idx=seq_idx, cu_seqlens=cu_seqlens, dt_softplus=dt_softplus, dt_limit=dt_limit,
        return_varlen_states=return_varlen_states, state_dtype=state_dtype,
    )  # fmt: skip
    asked = (True, return_final_states, return_varlen_states)
    outs = tuple(y for y, wanted in zip(found, asked, strict=True) if wanted)
    return outs if len(outs) > 1 else outs[0]


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan_combined` without states, documents and limits."""
    return chunk_scan(
        x, dt, A, B, C, D, chunk_size=chunk_size, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=None
    ).out


def ssd_chunk_scan_combined_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan` in plain operations of PyTorch: the generic form of the kernel."""
    return chunk_scan(
        x, dt, A, B, C, D, chunk_size=chunk_size, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=None,
        implementation="generic",
    ).out  # fmt: skip


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """Compute what is between the outer projections of a Mamba-2 block, and the last of them if it is given.

        z0, x0, z, xBC, dt = zxbcdt,    x, B, C = act(causal_conv1d(xBC))
        y = ssd(x, softplus(dt + dt_bias), A, B, C, D)
        out = out_proj([silu(z0) x0, norm(y silu(z))])

    Parameters
    ----------
    zxbcdt : Tensor, shape (batch, seqlen, 2 d_mlp + 2 dim + 2 ngroups dstate + nheads)
        What ``in_proj`` gives, with dim = nheads · headdim. There is no z0 and x0 where d_mlp is 0.
    conv1d_weight : Tensor, shape (dim + 2 ngroups dstate, width)
        Taps of the convolution.
    conv1d_bias : Tensor, shape (dim + 2 ngroups dstate,), or None
        Bias of the convolution.
    dt_bias, A : Tensor, shape (nheads,)
        Bias of the step sizes, and rates.
    D : Tensor, shape (nheads,) or (nheads, headdim), or None
        Skip connection.
    chunk_size : int
        As in `mamba_chunk_scan_combined`.
    initial_states : Tensor, shape (batch, nheads, headdim, dstate), optional
        The states before the first step; those of the first document if there is `seq_idx`.
    seq_idx : Tensor of int, shape (batch, seqlen), optional
        Numbers of packed documents; a negative one is padding for the convolution, as in `causal_conv1d_fn`.
    dt_limit : (float, float), default (0, inf)
        Least and greatest step size.
    return_final_states : bool, default False
        Return (out, final_states).
    activation : {"silu", "swish", None}, default "silu"
        That of the convolution.
    rmsnorm_weight : Tensor, shape (dim,), optional
        Weight of the gated norm, over dim / ngroups channels at a time. Default: the gate without a norm.
    rmsnorm_eps : float, default 1e-6
        Added to the mean square.
    outproj_weight : Tensor, shape (d_model, d_mlp + dim), optional
        The last projection. Default: none.
    outproj_bias : Tensor, shape (d_model,), optional
        Its bias; not without `outproj_weight`.
    headdim : int, optional
        Channels of a head, where `D` has none.
    ngroups : int, default 1
        Number of groups of heads.
    norm_before_gate : bool, default True
        norm(y) silu(z) in place of norm(y silu(z)).
    state_dtype : torch.dtype, optional
        As in `mamba_chunk_scan_combined`.

    Returns
    -------
    Tensor, shape (batch, seqlen, d_model or d_mlp + dim), or tuple
        The output; with `return_final_states`, also the states after the last step.

    Raises
    ------
    TypeError, ValueError
        If an argument is no tensor, has another shape than expected, or an unknown value; the message names it.
    """
    if outproj_bias is not None and outproj_weight is None:
        msg = "outproj_bias is given and outproj_weight None, expected a weight beside it"
        raise ValueError(msg)
    found = split_scan(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size=chunk_size, initial_states=initial_states,
        seq_idx=seq_idx, dt_limit=dt_limit, activation=activation, rmsnorm_weight=rmsnorm_weight,
        rmsnorm_eps=rmsnorm_eps, headdim=headdim, ngroups=ngroups, norm_before_gate=norm_before_gate,
        state_dtype=state_dtype,
    )  # fmt: skip
    out = found.out if outproj_weight is None else functional.linear(found.out, outproj_weight, outproj_bias)
    return (out, found.final_states) if return_final_states else out


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    chunk_size: int,
    dt_limit: tuple[float, float] = NO_LIMIT,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """`mamba_split_conv1d_scan_combined` in plain operations of PyTorch: the generic forms of the kernels."""
    out = split_scan(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size=chunk_size, dt_limit=dt_limit,
        activation=activation, rmsnorm_weight=rmsnorm_weight, rmsnorm_eps=rmsnorm_eps, headdim=headdim,
        ngroups=ngroups, norm_before_gate=norm_before_gate, implementation="generic",
    ).out  # fmt: skip
    return out if outproj_weight is None else functional.linear(out, outproj_weight, outproj_bias)
