"""The last inputs of each of several sequences that stand one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad_torch.layouts import Layout, check_integers

__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]


@torch.no_grad()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` inputs of each sequence, the latest last, and 0 before a sequence's first.

    Parameters
    ----------
    x : Tensor, shape (total_tokens, dim)
        The inputs of all sequences, one sequence after another.
    cu_seqlens : Tensor of int, shape (batch + 1,)
        The places where sequences begin, and the end of the last, in order.
    state_len : int
        How many inputs of each.

    Returns
    -------
    Tensor, shape (batch, dim, state_len)
        The states, without gradients, as in the original.

    Raises
    ------
    TypeError, ValueError
        If a shape is not as expected, or `cu_seqlens` is no ordered list of places.
    """
    layout = Layout()
    layout.check("x", x, "total_tokens dim")
    check_places(cu_seqlens, x.shape[0])
    if isinstance(state_len, bool) or not isinstance(state_len, int) or state_len < 1:
        msg = f"state_len is {state_len!r}, expected an integer of at least 1"
        raise ValueError(msg)
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    places = ends + torch.arange(-state_len, 0, device=x.device)
    if not x.shape[0]:
        return x.new_zeros(cu_seqlens.shape[0] - 1, state_len, x.shape[1]).mT
    rows = x[places.clamp(min=0)]
    return torch.where((places >= starts)[..., None], rows, 0.0).to(x.dtype).mT


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`causal_conv1d_varlen_states`, which is plain PyTorch already."""
    return causal_conv1d_varlen_states(x, cu_seqlens, state_len)


def check_places(cu_seqlens: Tensor, total: int) -> list[int]:
    """The places of a `cu_seqlens` as integers; an error unless they run in order from 0 to at most `total`.

    They may end before `total`: what is behind the last sequence is padding.
    """
    Layout().check("cu_seqlens", cu_seqlens, "batch+1")
    check_integers("cu_seqlens", cu_seqlens)
    places: list[int] = cu_seqlens.tolist()
    if not places or places[0] != 0 or places != sorted(places) or places[-1] > total:
        msg = f"cu_seqlens is {_short(places)}, expected places in order, the first 0 and the last at most {total}"
        raise ValueError(msg)
    return places


def _short(places: list[int]) -> str:
    return str(places) if len(places) < 9 else f"[{', '.join(map(str, places[:4]))}, …, {places[-1]}]"
