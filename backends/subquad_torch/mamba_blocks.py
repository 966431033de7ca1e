"""The Mamba blocks as modules, which hold a checkpoint's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subquad.blocks import init_mamba, init_mamba2, mamba, mamba2


class _Block(torch.nn.Module):
    """A block as a module: what both versions have in common."""

    def _begin(self, drawn: Mapping[str, Any], *no_decay: Tensor) -> None:
        """Set the parameters to those drawn, the others to 0, and mark those that optimisers should not let decay."""
        with torch.no_grad():
            for name, x in self.named_parameters():
                x.copy_(torch.from_numpy(drawn[name])) if name in drawn else x.zero_()
        for x in no_decay:
            x._no_weight_decay = True  # type: ignore[attr-defined] # what optimisers look for

    def forward(
        self,
        x: Tensor,
        *,
        state: Mapping[str, Tensor] | None = None,
        return_state: bool = False,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Any:
        """Compute the block.

        Parameters
        ----------
        x : Tensor, shape (..., n, d_model)
            Input sequence.
        state : mapping of Tensor, optional
            What an earlier call returned.
        return_state : bool, default False
            Return (out, state) instead of out.
        segments : Tensor of int, shape (..., n), optional
            Numbers of documents, each of which is as alone.
        mask : Tensor of bool, shape (..., n), optional
            False for a padded step.

        Returns
        -------
        Tensor, shape (..., n, d_model), or tuple
            The output; with `return_state`, the output and the state.

        Raises
        ------
        TypeError, ValueError
            As `subquad.mamba` or `subquad.mamba2`.
        """
        params = dict(self.named_parameters())
        given: Any = None if state is None else dict(state)
        return self._block(x, params, state=given, return_state=return_state, segments=segments, mask=mask)

    def _block(self, x: Tensor, params: dict[str, Any], **given: Any) -> Any:
        raise NotImplementedError


class Mamba(_Block):
    """A Mamba block as a module, with the state_dict of mamba-ssm's ``Mamba`` and transformers' ``MambaMixer`` [1]_.

    Parameters
    ----------
    d_model : int
        Width of the input and output.
    d_state : int, default 16
        Number of states of a channel.
    d_conv : int, default 4
        Number of taps of the convolution.
    expand : int, default 2
        d_inner = expand · d_model channels inside.
    dt_rank : int, optional
        Rank of the map to the step sizes. Default: d_model / 16, rounded up.
    bias : bool, default False
        Whether ``in_proj`` and ``out_proj`` have biases, which begin as 0.
    conv_bias : bool, default True
        Whether ``conv1d`` has a bias.
    seed : int, default 0
        Seed of the parameters, which `subquad.init_mamba` draws: give each layer of a model its own.
    device, dtype : optional
        Device and dtype of the parameters, as of any module.

    See Also
    --------
    Reversible : A residual layer that stores no activations.

    Notes
    -----
    `subquad.mamba` describes the computation. ``A_log``, ``D`` and ``dt_proj.bias`` have the attribute
    ``_no_weight_decay``, as in mamba-ssm. A model that initialises its linear layers anew must leave these out:
    `subquad.check_mamba` tells if it has not.

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.

    Examples
    --------
    >>> import torch, subquad_torch.nn
    >>> layer = subquad_torch.nn.Mamba(32)
    >>> x = torch.randn(2, 10, 32)
    >>> whole = layer(x)
    >>> first, state = layer(x[:, :7], return_state=True)
    >>> second = layer(x[:, 7:], state=state)
    >>> torch.allclose(torch.cat([first, second], dim=1), whole, atol=1e-6)
    True
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        seed: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        drawn = init_mamba(d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank, seed=seed)
        (d_inner, rank), made = drawn["dt_proj.weight"].shape, {"device": device, "dtype": dtype}
        self.in_proj = torch.nn.Linear(d_model, 2 * d_inner, bias=bias, **made)
        self.conv1d = torch.nn.Conv1d(
            d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias, **made
        )
        self.x_proj = torch.nn.Linear(d_inner, rank + 2 * d_state, bias=False, **made)
        self.dt_proj = torch.nn.Linear(rank, d_inner, **made)
        self.A_log = torch.nn.Parameter(torch.empty(d_inner, d_state, **made))
        self.D = torch.nn.Parameter(torch.empty(d_inner, **made))
        self.out_proj = torch.nn.Linear(d_inner, d_model, bias=bias, **made)
        self._begin(drawn, self.A_log, self.D, self.dt_proj.bias)

    def _block(self, x: Tensor, params: dict[str, Any], **given: Any) -> Any:
        return mamba(x, params, **given)


class Mamba2(_Block):
    """A Mamba-2 block as a module, with the state_dict of mamba-ssm's ``Mamba2`` and transformers' ``Mamba2Mixer``.

    Parameters
    ----------
    d_model : int
        Width of the input and output.
    d_state : int, default 128
        Number of states of a channel.
    d_conv : int, default 4
        Number of taps of the convolution.
    expand : int, default 2
        d_inner = expand · d_model channels inside.
    headdim : int, default 64
        Channels of a head; it must divide d_inner.
    groups : int, default 1
        Number of groups of heads that share B and C, and of channels that are normalised together.
    delta_limits : (float, float), optional
        The step sizes are clipped to this range.
    norm_eps : float, default 1e-5
        Added to the mean square in the norm.
    norm_before_gate : bool, default False
        Normalise first, and gate then.
    bias : bool, default False
        Whether ``in_proj`` and ``out_proj`` have biases, which begin as 0.
    conv_bias : bool, default True
        Whether ``conv1d`` has a bias.
    seed : int, default 0
        Seed of the parameters, which `subquad.init_mamba2` draws: give each layer of a model its own.
    device, dtype : optional
        Device and dtype of the parameters, as of any module.

    See Also
    --------
    Mamba : The block of the first version.

    Notes
    -----
    `subquad.mamba2` describes the computation [1]_. ``A_log``, ``D`` and ``dt_bias`` have the attribute
    ``_no_weight_decay``, as in mamba-ssm.

    References
    ----------
    .. [1] T. Dao, A. Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
       Space Duality", 2024.

    Examples
    --------
    >>> import torch, subquad_torch.nn
    >>> layer = subquad_torch.nn.Mamba2(32, d_state=16, headdim=16)
    >>> x = torch.randn(2, 10, 32)
    >>> whole = layer(x)
    >>> first, state = layer(x[:, :7], return_state=True)
    >>> second = layer(x[:, 7:], state=state)
    >>> torch.allclose(torch.cat([first, second], dim=1), whole, atol=1e-5)
    True
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        groups: int = 1,
        delta_limits: tuple[float, float] | None = None,
        norm_eps: float = 1e-5,
        norm_before_gate: bool = False,
        bias: bool = False,
        conv_bias: bool = True,
        seed: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        drawn = init_mamba2(
            d_model, d_state=d_state, d_conv=d_conv, expand=expand, headdim=headdim, groups=groups, seed=seed
        )
        made = {"device": device, "dtype": dtype}
        (inputs, _), (channels, _, _) = drawn["in_proj.weight"].shape, drawn["conv1d.weight"].shape
        (heads,), (d_inner,) = drawn["D"].shape, drawn["norm.weight"].shape
        self.how = {
            "groups": groups,
            "delta_limits": delta_limits,
            "norm_eps": norm_eps,
            "norm_before_gate": norm_before_gate,
        }
        self.in_proj = torch.nn.Linear(d_model, inputs, bias=bias, **made)
        self.conv1d = torch.nn.Conv1d(
            channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias, **made
        )
        self.dt_bias, self.A_log, self.D = (torch.nn.Parameter(torch.empty(heads, **made)) for _ in range(3))
        self.norm = torch.nn.Module()
        self.norm.weight = torch.nn.Parameter(torch.empty(d_inner, **made))
        self.out_proj = torch.nn.Linear(d_inner, d_model, bias=bias, **made)
        self._begin(drawn, self.A_log, self.D, self.dt_bias)

    def _block(self, x: Tensor, params: dict[str, Any], **given: Any) -> Any:
        return mamba2(x, params, **given, **self.how)  # type: ignore[call-overload]
