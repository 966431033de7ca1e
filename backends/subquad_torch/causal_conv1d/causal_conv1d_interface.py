"""The short causal convolution by the names and in the layouts of ``causal_conv1d``: channels before time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.scans import causal_conv1d
from subquad_torch.layouts import Layout, check_integers

__all__ = ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """Convolve each channel with a few taps, as ``causal_conv1d.causal_conv1d_fn`` does, by `subquad.causal_conv1d`.

        out[:, d, t] = act(bias[d] + Σ_k weight[d, width − 1 − k] x[:, d, t − k])

    Parameters
    ----------
    x : Tensor, shape (batch, dim, seqlen)
        Input, in any strides.
    weight : Tensor, shape (dim, width)
        The taps, the last of which multiplies the present input; any width.
    bias : Tensor, shape (dim,), optional
        Added to the sum.
    seq_idx : Tensor of int, shape (batch, seqlen), optional
        Numbers of packed documents: an output sees no input before the number changes. A negative number is padding,
        whose output is 0.
    initial_states : Tensor, shape (batch, dim, width - 1), optional
        The inputs before the first, the latest last; those of the first document if there is `seq_idx`.
    return_final_states : bool, default False
        Return (out, final_states).
    final_states_out : Tensor, shape (batch, dim, width - 1), optional
        Written to and returned as the final states, with `return_final_states`.
    activation : {None, "silu", "swish"}, default None
        Both names stand for s / (1 + exp(−s)).

    Returns
    -------
    Tensor, shape (batch, dim, seqlen), or tuple
        The output in the dtype of `x`; with `return_final_states`, also the last inputs, in the dtype of `x`.

    Raises
    ------
    TypeError, ValueError
        If an argument is no tensor, has another shape than expected, or an unknown value; the message names it.

    Examples
    --------
    >>> import torch
    >>> from subquad_torch.causal_conv1d import causal_conv1d_fn
    >>> causal_conv1d_fn(torch.tensor([[[1.0, 4.0, 9.0]]]), torch.tensor([[-1.0, 1.0]]))
    tensor([[[1., 3., 5.]]])
    """
    return _convolve(
        x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation, "auto"
    )


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """`causal_conv1d_fn` in plain operations of PyTorch: the generic form of the kernel."""
    return _convolve(
        x, weight, bias, None, initial_states, return_final_states, final_states_out, activation, "generic"
    )


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next inputs of sequences whose last inputs are in a cache, and write them to the cache.

    Parameters
    ----------
    x : Tensor, shape (batch, dim) or (batch, dim, seqlen)
        One new input, or several.
    conv_state : Tensor, shape (entries, dim, state_len)
        The cache, written in place: at least width − 1 last inputs, the latest last. There are batch entries, or, with
        `conv_state_indices`, any number.
    weight : Tensor, shape (dim, width)
        The taps.
    bias : Tensor, shape (dim,), optional
        Added to the sum.
    activation : {None, "silu", "swish"}, default None
        Both names stand for s / (1 + exp(−s)).
    cache_seqlens : Tensor of int, shape (batch,), optional
        How many inputs there were before. The cache is then a ring: input i of a sequence stands at place
        i mod state_len.
    conv_state_indices : Tensor of int, shape (batch,), optional
        The entry of the cache of each sequence. A negative one is padding: its output is 0, and nothing is written.

    Returns
    -------
    Tensor, shape of x
        The outputs, without gradients, as in the original.

    Raises
    ------
    TypeError, ValueError
        As `causal_conv1d_fn`.
    """
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, "auto")


@torch.no_grad()
def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` in plain operations of PyTorch: the generic form of the kernel."""
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, None, "generic")


def padding_of(seq_idx: Tensor) -> Tensor | None:
    """The mask of steps whose number is not negative; None where all count, which no traced call knows."""
    keep = seq_idx >= 0
    return None if not torch.compiler.is_compiling() and bool(keep.all()) else keep


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial_states: Tensor | None,
    return_final_states: bool, final_states_out: Tensor | None, activation: str | None, implementation: str,
) -> Any:  # fmt: skip
    layout = Layout()
    layout.check("x", x, "batch dim seqlen")
    layout.check("weight", weight, "dim width")
    layout.check("bias", bias, "dim")
    layout.check("seq_idx", seq_idx, "batch seqlen")
    check_integers("seq_idx", seq_idx)
    history = f"batch dim {layout['width'] - 1}"
    layout.check("initial_states", initial_states, history)
    layout.check("final_states_out", final_states_out, history)
    if final_states_out is not None and not return_final_states:
        msg = "final_states_out is given, expected with return_final_states=True alone: nothing would be written to it"
        raise ValueError(msg)
    y, state = causal_conv1d(
        x.mT, weight, bias, activation=activation, initial_state=None if initial_states is None else initial_states.mT,
        segments=seq_idx, mask=None if seq_idx is None else padding_of(seq_idx), return_state=True,
        implementation=implementation,
    )  # fmt: skip
    if not return_final_states:
        return y.mT
    final_states = state.to(x.dtype).mT
    return y.mT, final_states if final_states_out is None else final_states_out.copy_(final_states)


def _update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    cache_seqlens: Tensor | None, conv_state_indices: Tensor | None, implementation: str,
) -> Tensor:  # fmt: skip
    layout = Layout()
    layout.check("x", x, "batch dim", "batch dim seqlen")
    layout.check("weight", weight, "dim width")
    layout.check("bias", bias, "dim")
    layout.check("cache_seqlens", cache_seqlens, "batch")
    layout.check("conv_state_indices", conv_state_indices, "batch")
    layout.check("conv_state", conv_state, f"{'batch' if conv_state_indices is None else 'entries'} dim state_len")
    check_integers("cache_seqlens", cache_seqlens)
    check_integers("conv_state_indices", conv_state_indices)
    width, state_len = layout["width"], layout["state_len"]
    if state_len < width - 1:
        msg = (
            f"conv_state has {state_len} inputs, expected at least width − 1 = {width - 1} of weight {(*weight.shape,)}"
        )
        raise ValueError(msg)
    steps = x if x.ndim == 3 else x[..., None]
    keep = None if conv_state_indices is None else conv_state_indices >= 0
    entries = None if conv_state_indices is None else conv_state_indices.long()
    state = conv_state if entries is None else conv_state[entries.clamp(min=0)]
    # where the inputs before and the new ones stand
    if cache_seqlens is None:
        before = torch.arange(state_len - width + 1, state_len, device=x.device)[None, :]
        new = None
    else:
        first = cache_seqlens.long()[:, None]
        before = torch.remainder(first + torch.arange(1 - width, 0, device=x.device), state_len)
        new = torch.remainder(first + torch.arange(steps.shape[2], device=x.device), state_len)
    history = state.gather(2, before[:, None, :].expand(*state.shape[:2], width - 1))
    y = causal_conv1d(
        steps.mT, weight, bias, activation=activation, initial_state=history.mT, implementation=implementation
    ).mT
    last = steps[..., -state_len:].to(state.dtype)
    if new is None:
        state = torch.cat([state, last], dim=2)[..., -state_len:]
    else:  # of more inputs than there are places, the last ones stay
        places = new[:, None, -state_len:].expand(*state.shape[:2], last.shape[2])
        state = state.scatter(2, places, last)
    if entries is None or keep is None:
        conv_state.copy_(state)
    else:
        conv_state[entries[keep]] = state[keep]
        y = torch.where(keep[:, None, None], y, 0.0)
    return y if x.ndim == 3 else y[..., 0]
