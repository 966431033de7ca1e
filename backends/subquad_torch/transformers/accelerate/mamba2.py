"""The layers of Mamba-2, in Mamba-2 itself, Bamba, Zamba2, Nemotron-H, Granite 4 and Falcon-H1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from subquad.scans import causal_conv1d, ssd
from subquad_torch.transformers.accelerate.mamba import rates
from subquad_torch.transformers.accelerate.recurrent import Past, Recurrent, Time, runs
from subquad_torch.transformers.accelerate.swap import Swapped


class Mamba2Mixer(Recurrent):
    """A Mamba-2 layer [1]_.

        z, u, delta = in_proj(x)
        u, B, C = silu(causal_conv1d(u))
        y = ssd(u, clip(softplus(delta + dt_bias)), −exp(A_log), B, C, D)
        out = out_proj(norm(y, z))

    References
    ----------
    .. [1] T. Dao, A. Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
       Space Duality", 2024, section 7.
    """

    in_proj: Any
    out_proj: Any
    norm: Any
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    time_step_limit: Any
    num_heads: int
    head_dim: int
    n_groups: int
    ssm_state_size: int
    intermediate_size: int
    conv_dim: int

    @property
    def subquad_runs(self) -> str:
        zeros = self.A_log.detach().new_zeros
        delta, maps = zeros((1, 1, self.num_heads)), zeros((1, 1, self.n_groups, self.ssm_state_size))
        x, A = zeros((1, 1, self.num_heads, self.head_dim)), zeros(self.num_heads).float()
        taps = zeros((self.conv_dim, self.conv_kernel_size))
        scan = ssd, (x, delta, A, maps, maps)
        return runs((causal_conv1d, (zeros((1, 1, self.conv_dim)), taps)), scan)

    def subquad_project(self, x: Tensor) -> Tensor:
        """z, u, B, C and delta beside each other."""
        return self.in_proj(x)

    def subquad_gate(self, y: Tensor, z: Tensor) -> Tensor:
        """The norm of the gated output of the scan."""
        return self.norm(y, z)

    def subquad_mix(self, x: Tensor, past: Past, time: Time) -> tuple[Tensor, Past]:
        sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
        z, u, delta = self.subquad_project(x).split(sizes, dim=-1)
        u, conv = self.subquad_convolve(u, past, time)
        maps = self.n_groups * self.ssm_state_size
        u, B, C = u.split([self.intermediate_size, maps, maps], dim=-1)
        B, C = (a.unflatten(-1, (self.n_groups, self.ssm_state_size)) for a in (B, C))
        y, state = ssd(
            widened(u).unflatten(-1, (self.num_heads, self.head_dim)), delta, rates(self.A_log), B, C, self.D,
            delta_bias=self.dt_bias, delta_softplus=True, delta_limits=limits(self.time_step_limit),
            initial_state=past.state, return_state=True, mask=time.mask, segments=time.segments,
        )  # fmt: skip
        return self.out_proj(self.subquad_gate(y.flatten(-2), z).to(x.dtype)), Past(conv, state)


class FalconH1Mixer(Mamba2Mixer):
    """The Mamba-2 layer of Falcon-H1: multipliers of its input and of each part of it, a norm that may be absent."""

    ssm_in_multiplier: float
    mup_vector: Tensor
    mamba_rms_norm: bool

    def subquad_project(self, x: Tensor) -> Tensor:
        return self.in_proj(x * self.ssm_in_multiplier) * self.mup_vector

    def subquad_gate(self, y: Tensor, z: Tensor) -> Tensor:
        return self.norm(y, z) if self.mamba_rms_norm else y * torch.nn.functional.silu(z)


class BambaModel(Swapped):
    """The model around Bamba's layers: the positions of new tokens go on after those in the cache, and not from 0."""

    @property
    def subquad_runs(self) -> str:
        return "the code of transformers, with positions that continue after a cache"

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, cache: Any = None,
        inputs_embeds: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        given = input_ids if inputs_embeds is None else inputs_embeds
        if position_ids is None and cache is not None and given is not None:
            start = cache.get_seq_length()
            position_ids = torch.arange(start, start + given.shape[1], device=given.device)[None]
        return super().forward(
            input_ids, attention_mask, position_ids, cache=cache, inputs_embeds=inputs_embeds, **kwargs
        )


def widened(x: Tensor) -> Tensor:
    """x in float32 at least, so that the norm behind the scan sees what the scan computed, and not its rounding."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def limits(given: Any) -> tuple[float, float] | None:
    """The limits of the step sizes; None where they rule out no positive number."""
    low, high = (float(x) for x in given)
    return None if low <= 0 and high == math.inf else (low, high)
