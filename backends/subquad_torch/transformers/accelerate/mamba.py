"""The layers of Mamba, and those with norms of Δ, B and C: FalconMamba and Jamba."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from subquad.blocks import mamba
from subquad.scans import causal_conv1d, selective_scan
from subquad_torch.transformers.accelerate.recurrent import Past, Recurrent, Time, runs

# the children whose parameters make a block, and what they have to be for it
BLOCK = {
    "in_proj": torch.nn.Linear,
    "conv1d": torch.nn.Conv1d,
    "x_proj": torch.nn.Linear,
    "dt_proj": torch.nn.Linear,
    "out_proj": torch.nn.Linear,
}


class MambaMixer(Recurrent):
    """A Mamba layer [1]_.

        u, z = in_proj(x)
        u ← silu(causal_conv1d(u))
        delta, B, C = x_proj(u)
        y = selective_scan(u, softplus(dt_proj(delta)), −exp(A_log), B, C, D) silu(z)
        out = out_proj(y)

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4.
    """

    reads = ("conv1d", "dt_proj")

    in_proj: Any
    x_proj: Any
    dt_proj: Any
    out_proj: Any
    A_log: Tensor
    D: Tensor
    time_step_rank: int
    ssm_state_size: int

    @property
    def subquad_runs(self) -> str:
        like = self.A_log.detach()
        u, low = like.new_zeros((1, 1, like.shape[0])), like.new_zeros((1, 1, like.shape[1]))
        scan = selective_scan, (u, u, like.float(), low, low)
        return runs((causal_conv1d, (u, like.new_zeros((like.shape[0], self.conv_kernel_size)))), scan)

    def subquad_parameters(self, x: Tensor) -> dict[str, Tensor] | None:
        """The parameters for `subquad.mamba`; None where modules have to be called, or where the block is no gain."""
        if x.shape[1] > 1 or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return None
        children, params = vars(self)["_modules"], {}
        for name, kind in BLOCK.items():
            child = children[name]
            if type(child) is not kind or child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child):
                return None
            for part, weight in child._parameters.items():
                if weight is not None:
                    params[f"{name}.{part}"] = weight
        own = vars(self)["_parameters"]
        return {**params, "A_log": own["A_log"], "D": own["D"]}

    def subquad_maps(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(delta before the bias, B, C), from the output of the convolution."""
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        low, B, C = self.x_proj(u).split(sizes, dim=-1)
        return step_sizes(self.dt_proj, low), B, C

    def subquad_mix(self, x: Tensor, past: Past, time: Time) -> tuple[Tensor, Past]:
        if past.conv is not None and time.mask is None and (params := self.subquad_parameters(x)):
            return one_token(x, params, past)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = self.subquad_convolve(u, past, time)
        delta, B, C = self.subquad_maps(u)
        y, state = selective_scan(
            u, delta, rates(self.A_log), B, C, self.D, z=z, delta_bias=self.dt_proj.bias, delta_softplus=True,
            initial_state=past.state, return_state=True, mask=time.mask, segments=time.segments,
        )  # fmt: skip
        return self.out_proj(y.to(x.dtype)), Past(conv, state)


class NormedMixer(MambaMixer):
    """A Mamba layer with norms of Δ, B and C, as FalconMamba (without weights) and Jamba have them."""

    dt_layernorm: Any
    b_layernorm: Any
    c_layernorm: Any

    def subquad_parameters(self, x: Tensor) -> None:
        return None  # the block has no norms inside

    def subquad_maps(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        low, B, C = self.x_proj(u).split(sizes, dim=-1)
        return step_sizes(self.dt_proj, self.dt_layernorm(low)), self.b_layernorm(B), self.c_layernorm(C)


def one_token(x: Tensor, params: dict[str, Tensor], past: Past) -> tuple[Tensor, Past]:
    """A whole layer by `subquad.mamba`, which reads each weight of a step once."""
    conv, ssm = past
    assert conv is not None
    assert ssm is not None
    out, state = mamba(x, params, state={"conv": conv[..., 1:].mT, "ssm": ssm}, return_state=True)
    return out, Past(torch.nn.functional.pad(state["conv"].mT, (1, 0)), state["ssm"])


def rates(A_log: Tensor) -> Tensor:
    """A = −exp(A_log), in float32 at least."""
    return -torch.exp(A_log if A_log.dtype is torch.float64 else A_log.float())


def step_sizes(projection: Any, low: Tensor) -> Tensor:
    """Δ before its bias and softplus, in float32 at least: half precision would put it off by a per cent."""
    weight = projection.weight
    if not weight.is_floating_point():  # quantised: the module alone knows what its numbers mean
        return projection(low) - projection.bias
    if weight.dtype is low.dtype and not torch.is_autocast_enabled(low.device.type):
        if weight.dtype in (torch.float32, torch.float64):
            return linear(low, weight)
        return linear(low.float(), weight.float())
    with torch.autocast(low.device.type, enabled=False):
        wide = torch.float64 if torch.float64 in (low.dtype, weight.dtype) else torch.float32
        return linear(low.to(wide), weight.to(wide))
