"""Forward, backward and update as functions of their own, for code that writes its autograd functions around them."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad_torch.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__all__ = ["causal_conv1d_bwd_function", "causal_conv1d_fwd_function", "causal_conv1d_update_function"]


@torch.no_grad()
def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """The output of `causal_conv1d_fn`, without a record for gradients; the last inputs go to `final_states_out`."""
    activation, final = "silu" if silu_activation else None, final_states_out is not None
    out = causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, final, final_states_out, activation)
    return out[0] if final else out


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients (dx, dweight, dbias, dinitial_states) for those of the outputs, the first also in a given `dx`."""
    given = [None if a is None else a.detach().requires_grad_() for a in (x, weight, bias, initial_states)]
    with torch.enable_grad():
        activation = "silu" if silu_activation else None
        inputs, taps, shift, before = given
        assert inputs is not None
        assert taps is not None
        outs = causal_conv1d_fn(inputs, taps, shift, seq_idx, before, dfinal_states is not None, None, activation)
    outs, douts = (outs, (dout, dfinal_states)) if dfinal_states is not None else ((outs,), (dout,))
    found = iter(torch.autograd.grad(outs, [a for a in given if a is not None], douts))
    grads = [None if a is None else next(found) for a in given]
    if dx is not None:
        grads[0] = dx.copy_(grads[0])
    if not return_dinitial_states:
        grads[3] = None
    return tuple(grads)  # type: ignore[return-value]


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d_update` for the activation as a flag."""
    activation = "silu" if silu_activation else None
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
