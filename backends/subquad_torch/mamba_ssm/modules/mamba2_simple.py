"""The Mamba-2 block without caches, with initial states that are learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from subquad_torch.mamba_ssm.modules.initial import biases_of_steps, parameter
from subquad_torch.mamba_ssm.ops.split import NO_LIMIT, split_scan
from subquad_torch.mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated

__all__ = ["Mamba2Simple"]


class Mamba2Simple(nn.Module):
    """A Mamba-2 block without an inference cache.

    Parameters
    ----------
    d_model : int
        Width of the input and output.
    d_state, d_conv, expand, headdim, ngroups : int
        States of a channel, taps of the convolution, d_inner / d_model, channels of a head, groups of heads.
    conv_init : float, optional
        The taps begin uniform in ±conv_init. Default: as PyTorch draws them.
    A_init_range : (float, float)
        The rates −A begin uniform in this range.
    dt_min, dt_max, dt_init_floor : float
        The steps begin log-uniform from `dt_min` to `dt_max`, at least `dt_init_floor`.
    dt_limit : (float, float)
        Least and greatest step size.
    learnable_init_states : bool, default False
        Whether the states before the first step are parameters, which begin as 0.
    activation : {"swish", "silu"}
        That of the convolution.
    bias, conv_bias : bool
        Whether the outer projections, and the convolution, have biases.
    chunk_size : int
        The length of the original's chunks; results do not depend on it.
    use_mem_eff_path : bool, default True
        Which of two forms the original computes; here there is one, its default, and nothing depends on it.
    layer_idx : int, optional
        Kept as an attribute.
    device, dtype : optional
        Those of the parameters; ``D`` is float32.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = NO_LIMIT,
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.conv_init = d_model, d_state, d_conv, conv_init
        self.expand, self.headdim, self.ngroups, self.d_inner = expand, headdim, ngroups, expand * d_model
        self.nheads = self.d_inner // headdim
        if self.d_inner % headdim or self.nheads % ngroups:
            msg = (
                f"headdim is {headdim} and ngroups {ngroups} for d_inner = {self.d_inner}; expected that headdim "
                f"divides it, and ngroups the number of heads"
            )
            raise ValueError(msg)
        self.dt_limit, self.learnable_init_states, self.activation = tuple(dt_limit), learnable_init_states, activation
        self.chunk_size, self.use_mem_eff_path, self.layer_idx, self.act = (
            chunk_size, use_mem_eff_path, layer_idx, nn.SiLU(),
        )  # fmt: skip
        conv_dim = self.d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + conv_dim + self.nheads, bias=bias, **made)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1, bias=conv_bias, **made)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        if learnable_init_states:
            self.init_states = parameter(torch.zeros(self.nheads, headdim, d_state, **made))
        self.dt_bias = parameter(biases_of_steps(self.nheads, dt_min, dt_max, dt_init_floor, **made))
        rates = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = parameter(torch.log(rates).to(dtype))
        self.D = parameter(torch.ones(self.nheads, device=device))
        self.norm = RMSNormGated(self.d_inner, eps=1e-5, norm_before_gate=False, **made)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """The output for (batch, seqlen, d_model); `seq_idx` (batch, seqlen) numbers packed documents."""
        start = self.init_states.expand(u.shape[0], -1, -1, -1) if self.learnable_init_states else None
        found = split_scan(
            self.in_proj(u), self.conv1d.weight[:, 0, :], self.conv1d.bias, self.dt_bias,
            -torch.exp(self.A_log.float()), self.D, chunk_size=self.chunk_size, headdim=self.headdim,
            ngroups=self.ngroups, dt_limit=self.dt_limit, initial_states=start, seq_idx=seq_idx,
            activation=self.activation, rmsnorm_weight=self.norm.weight, rmsnorm_eps=self.norm.eps,
            norm_before_gate=False,
        )  # fmt: skip
        return self.out_proj(found.out)
