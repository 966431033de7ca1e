"""The selective scan by the names and in the layouts of ``mamba_ssm``: channels before time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from subquad.scans import selective_scan
from subquad_torch.layouts import Layout
from subquad_torch.mamba_ssm.ops.mixer import mix
from subquad_torch.mamba_ssm.ops.triton.layer_norm import rms_norm_fn

__all__ = ["mamba_inner_fn", "mamba_inner_ref", "rms_norm_forward", "selective_scan_fn", "selective_scan_ref"]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """Compute a selective scan as ``mamba_ssm``'s ``selective_scan_fn`` does, by `subquad.selective_scan`.

        Δ = softplus(delta + delta_bias)
        h[t] = exp(Δ[t] A) h[t−1] + Δ[t] B[t] u[t],    out[t] = (C[t]·h[t] + D u[t]) silu(z[t])

    Parameters
    ----------
    u, delta : Tensor, shape (batch, dim, seqlen)
        Input and step sizes.
    A : Tensor, shape (dim, dstate)
        State matrix, real or complex.
    B, C : Tensor, shape (dim, dstate), (batch, dstate, seqlen) or (batch, groups, dstate, seqlen)
        Input and output maps. Beside a complex `A`, those with a time axis are real and have 2 seqlen numbers there,
        real and imaginary part in turn.
    D : Tensor, shape (dim,), optional
        Skip connection.
    z : Tensor, shape (batch, dim, seqlen), optional
        Gate.
    delta_bias : Tensor, shape (dim,), optional
        Added to `delta`, before softplus.
    delta_softplus : bool, default False
        Whether softplus is applied to the step sizes.
    return_last_state : bool, default False
        Return (out, last_state).

    Returns
    -------
    Tensor, shape (batch, dim, seqlen), or tuple
        The output in the dtype of `u`; with `return_last_state`, also the state (batch, dim, dstate), at least float32.
        Unlike the original's, its gradient counts.

    Raises
    ------
    TypeError, ValueError
        If an argument is no tensor or has another shape than expected; the message names it.

    Examples
    --------
    >>> import torch
    >>> from subquad_torch.mamba_ssm import selective_scan_fn
    >>> one = torch.ones(1, 1, 3)
    >>> selective_scan_fn(one, one, torch.zeros(1, 1), one, one)
    tensor([[[1., 2., 3.]]])
    """
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, "auto")


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """`selective_scan_fn` in plain operations of PyTorch: the generic form of the kernel."""
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, "generic")


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Compute what is between the two outer projections of a Mamba block, and the last of them.

        x, z = xz,    x ← silu(causal_conv1d(x)),    delta, B, C = x_proj(x),    delta ← delta_proj_weight delta
        out = out_proj(selective_scan(x, delta, A, B, C, D, z, delta_bias))

    Parameters
    ----------
    xz : Tensor, shape (batch, 2 dim, seqlen)
        What ``in_proj`` gives.
    conv1d_weight : Tensor, shape (dim, 1, width)
        Taps of the convolution.
    conv1d_bias : Tensor, shape (dim,), or None
        Bias of the convolution.
    x_proj_weight : Tensor, shape (delta_rank + dstate for each of B and C that is None, dim)
        Projection to delta, B and C; beside a complex `A` there are 2 dstate numbers for each map.
    delta_proj_weight : Tensor, shape (dim, delta_rank)
        Projection to the step sizes.
    out_proj_weight : Tensor, shape (d_model, dim)
        The last projection.
    out_proj_bias : Tensor, shape (d_model,), or None
        Its bias.
    A : Tensor, shape (dim, dstate)
        State matrix, real or complex.
    B, C : Tensor, optional
        Maps as in `selective_scan_fn`. None: `x_proj_weight` makes them.
    D : Tensor, shape (dim,), optional
        Skip connection.
    delta_bias : Tensor, shape (dim,), optional
        Bias of the step sizes.
    B_proj_bias, C_proj_bias : Tensor, shape (dstate,), optional
        Added to the maps that `x_proj_weight` makes.
    delta_softplus : bool, default True
        Whether softplus is applied to the step sizes.
    checkpoint_lvl : {0, 1}, default 1
        How much the original computes again in its backward pass. Here it changes nothing: results are equal at both.
    b_rms_weight, c_rms_weight : Tensor, shape (dstate,), optional
        Weights of a root-mean-square norm of B and of C.
    dt_rms_weight : Tensor, shape (dim,), optional
        Weight of a root-mean-square norm of the step sizes before their bias.
    b_c_dt_rms_eps : float, default 1e-6
        Added to the mean squares in these norms.

    Returns
    -------
    Tensor, shape (batch, seqlen, d_model)
        The output of the block.

    Raises
    ------
    TypeError, ValueError
        If an argument is no tensor, has another shape than expected, or an unknown value; the message names it.
    """
    if checkpoint_lvl not in (0, 1):
        msg = f"checkpoint_lvl is {checkpoint_lvl!r}, expected 0 or 1"
        raise ValueError(msg)
    made = {
        "B": {"B_proj_bias": B_proj_bias, "b_rms_weight": b_rms_weight},
        "C": {"C_proj_bias": C_proj_bias, "c_rms_weight": c_rms_weight},
    }
    for name, x in (("B", B), ("C", C)):
        for other, given in made[name].items():
            if x is not None and given is not None:
                msg = (
                    f"{other} is given beside {name}, expected one of them: it is for a {name} that x_proj_weight makes"
                )
                raise ValueError(msg)
    norms = [
        None if w is None else lambda x, w=w: rms_norm_forward(x, w, None, b_c_dt_rms_eps)
        for w in (b_rms_weight, c_rms_weight, dt_rms_weight)
    ]
    return _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus, norms, "auto",
    )  # fmt: skip


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` in plain operations of PyTorch: the generic forms of the kernels."""
    return _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus, [None] * 3, "generic",
    )  # fmt: skip


def rms_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6, is_rms_norm: bool = True
) -> Tensor:
    """A norm of the rows of `x`, by the mean square or, without `is_rms_norm`, by mean and variance."""
    return rms_norm_fn(x, weight, bias, eps=eps, is_rms_norm=is_rms_norm)


def _inner(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor, B: Tensor | None, C: Tensor | None,
    D: Tensor | None, delta_bias: Tensor | None, B_proj_bias: Tensor | None, C_proj_bias: Tensor | None,
    delta_softplus: bool, norms: list[Any], implementation: str,
) -> Tensor:  # fmt: skip
    layout = Layout()
    layout.check("A", A, "dim dstate")
    layout.sizes["2·dim"] = 2 * layout["dim"]
    layout.known_from["2·dim"] = "A has"
    layout.check("xz", xz, "batch 2·dim seqlen")
    layout.check("conv1d_weight", conv1d_weight, "dim 1 width")
    layout.check("delta_proj_weight", delta_proj_weight, "dim delta_rank")
    per_map = layout["dstate"] * (2 if A.is_complex() else 1)
    rows = layout["delta_rank"] + per_map * ((B is None) + (C is None))
    layout.check("x_proj_weight", x_proj_weight, f"{rows} dim")
    layout.check("out_proj_weight", out_proj_weight, "d_model dim")
    maps = [None if x is None else _map(layout, name, x, A) for name, x in (("B", B), ("C", C))]
    y, _, _ = mix(
        xz.mT, conv1d_weight[:, 0, :], conv1d_bias, lambda x: functional.linear(x, x_proj_weight), delta_proj_weight,
        A, D, delta_bias, maps=(maps[0], maps[1]), map_biases=(B_proj_bias, C_proj_bias), norms=tuple(norms),
        delta_softplus=delta_softplus, implementation=implementation,
    )  # fmt: skip
    return functional.linear(y, out_proj_weight, out_proj_bias)


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, return_last_state: bool, implementation: str,
) -> Any:  # fmt: skip
    layout = Layout()
    layout.check("u", u, "batch dim seqlen")
    layout.check("delta", delta, "batch dim seqlen")
    layout.check("A", A, "dim dstate")
    layout.check("D", D, "dim")
    layout.check("z", z, "batch dim seqlen")
    layout.check("delta_bias", delta_bias, "dim")
    y, state = selective_scan(
        u.mT, delta.mT, A, _map(layout, "B", B, A), _map(layout, "C", C, A), D, z=None if z is None else z.mT,
        delta_bias=delta_bias, delta_softplus=delta_softplus, return_state=True, implementation=implementation,
    )  # fmt: skip
    return (y.mT, state) if return_last_state else y.mT


def _map(layout: Layout, name: str, x: Tensor, A: Tensor) -> Tensor:
    """B or C with time first, and complex where A is."""
    if isinstance(x, Tensor) and x.ndim > 2 and A.is_complex():
        layout.sizes["2·seqlen"], layout.known_from["2·seqlen"] = 2 * layout["seqlen"], "u has, and A is complex"
        layout.check(name, x, "batch dstate 2·seqlen", f"batch {name}-groups dstate 2·seqlen")
        if x.is_complex():
            msg = f"{name} is complex, expected real numbers, real and imaginary parts in turn along the last axis"
            raise TypeError(msg)
        wide = torch.promote_types(x.dtype, torch.float32)
        x = torch.view_as_complex(x.to(wide).reshape(*x.shape[:-1], layout["seqlen"], 2))
    else:
        layout.check(name, x, "dim dstate", "batch dstate seqlen", f"batch {name}-groups dstate seqlen")
    return x if x.ndim == 2 else x.mT if x.ndim == 3 else x.permute(0, 3, 1, 2)
