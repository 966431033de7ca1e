"""The layers of the gated delta rule, in Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from subquad.scans import causal_conv1d, delta_rule
from subquad_torch.transformers.accelerate.mamba import rates
from subquad_torch.transformers.accelerate.recurrent import Past, Recurrent, Time, runs

EPS = 1e-6  # in the length of a query or a key


class Projected(NamedTuple):
    """What a layer makes of its input: q, k and v beside each other, the gate, and the inputs of β and of the decay."""

    qkv: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


class Qwen3NextMixer(Recurrent):
    """A gated DeltaNet layer [1]_.

        q, k, v, z, b, a = in_proj(x)
        q, k, v ← silu(causal_conv1d(q, k, v)),    q ← q / |q|,    k ← k / |k|
        o = delta_rule(q, k, v, sigmoid(b), −exp(A_log) softplus(a + dt_bias))
        out = out_proj(norm(o, z))

    References
    ----------
    .. [1] S. Yang, J. Kautz, A. Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", ICLR 2025.
    """

    norm: Any
    out_proj: Any
    A_log: Tensor
    dt_bias: Tensor
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    key_dim: int
    value_dim: int

    in_proj_qkvz: Any
    in_proj_ba: Any
    fix_query_key_value_ordering: Any

    @property
    def subquad_runs(self) -> str:
        zeros, channels = self.A_log.detach().new_zeros, 2 * self.key_dim + self.value_dim
        k, v = zeros((1, 1, self.head_k_dim)), zeros((1, 1, self.head_v_dim))
        scan = delta_rule, (k, k, v, zeros((1, 1)), zeros((1, 1, 1)).float())
        return runs((causal_conv1d, (zeros((1, 1, channels)), zeros((channels, self.conv_kernel_size)))), scan)

    def subquad_project(self, x: Tensor) -> Projected:
        """What the layer makes of its input."""
        q, k, v, z, b, a = self.fix_query_key_value_ordering(self.in_proj_qkvz(x), self.in_proj_ba(x))
        return Projected(torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1), z, b, a)

    def subquad_mix(self, x: Tensor, past: Past, time: Time) -> tuple[Tensor, Past]:
        given = self.subquad_project(x)
        qkv, conv = self.subquad_convolve(given.qkv, past, time)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k = (by_head(unit(a.unflatten(-1, (-1, self.head_k_dim)))) for a in (q, k))
        v = by_head(v.unflatten(-1, (-1, self.head_v_dim)))
        shared = self.num_v_heads // self.num_k_heads  # value heads that read one key head
        q, k = (a.repeat_interleave(shared, dim=1) if shared > 1 else a for a in (q, k))
        g = rates(self.A_log) * softplus(given.a.float() + self.dt_bias)
        mask, segments = (None if a is None else a[:, None] for a in time)
        o, state = delta_rule(
            q, k, v, given.b.sigmoid().mT, g.mT[..., None],
            initial_state=past.state, return_state=True, mask=mask, segments=segments,
        )  # fmt: skip
        o = self.norm(by_head(o).to(x.dtype).flatten(0, 2), given.z.flatten(0, 2))
        return self.out_proj(o.reshape(*x.shape[:2], -1)), Past(conv, state)


class Qwen35Mixer(Qwen3NextMixer):
    """The layer of Qwen3.5, whose projections are apart."""

    in_proj_qkv: Any
    in_proj_z: Any
    in_proj_b: Any
    in_proj_a: Any

    def subquad_project(self, x: Tensor) -> Projected:
        z = self.in_proj_z(x).unflatten(-1, (-1, self.head_v_dim))
        return Projected(self.in_proj_qkv(x), z, self.in_proj_b(x), self.in_proj_a(x))


def by_head(x: Tensor) -> Tensor:
    """(batch, n, heads, d) as (batch, heads, n, d), and back."""
    return x.transpose(1, 2)


def unit(x: Tensor) -> Tensor:
    """x / √(|x|² + EPS) along the last axis, in float32 at least."""
    x = x if x.dtype is torch.float64 else x.float()
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + EPS)
