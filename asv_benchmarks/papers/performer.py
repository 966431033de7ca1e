"""Performer's forward and backward time against length, beside the limit "X-OPT" (Choromanski et al., 2021, figure 3).

The model is one layer of the paper's regular model: 512 channels, 8 heads, 2048 channels in the feed-forward part. In
the limit, attention returns v, so the time is that of the rest of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

import subquad
from asv_benchmarks.harness import Run, doubling
from asv_benchmarks.papers.paper import Paper, Row

WIDTH, HEADS, HIDDEN, FEATURES = 512, 8, 2048, 256
FORWARD, BOTH = "forward", "forward + backward"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """A transformer layer: x + A(norm x), then x + F(norm x), with `attend` between the projections of A."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.to_qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.to_out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(gelu(self.wide(self.norms[1](x))))


def of(make: Callable[[], Attend], backward: bool) -> Callable[[int], Run]:
    def of_length(n: int) -> Run:
        torch.manual_seed(0)
        layer = Layer(make())
        x, weight = torch.randn(2, 1, n, WIDTH).unbind()
        parameters = list(layer.parameters())
        x.requires_grad_()

        def run() -> Any:
            out = layer(x)  # recorded for gradients, as in training
            return torch.autograd.grad(out, [x, *parameters], weight, allow_unused=True) if backward else out

        return run

    return of_length


def ours() -> Attend:
    method = subquad.Favor(num_features=FEATURES)
    return lambda q, k, v: subquad.attention(q, k, v, method)


def performer_pytorch() -> Attend:
    from performer_pytorch import FastAttention

    return FastAttention(WIDTH // HEADS, nb_features=FEATURES)


def unfused() -> Attend:
    return lambda q, k, v: torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1) @ v


def rows(group: str) -> list[Row]:
    ways: list[tuple[str, Callable[[], Attend], int]] = [
        ("X-OPT: attention replaced by v", lambda: lambda q, k, v: v, 16384),
        ("Performer-256, subquad", ours, 16384),
        ("Performer-256 (performer-pytorch)", performer_pytorch, 16384),
        ("Transformer, fused (torch SDPA)", lambda: scaled_dot_product_attention, 8192),
        ("Transformer, unfused", unfused, 4096),
    ]
    return [Row(name, of(make, group == BOTH), longest, group) for name, make, longest in ways]


PAPER = Paper(
    title=f"Performer: one layer, {WIDTH} channels, {HEADS} heads, {FEATURES} features, float32",
    source='K. Choromanski et al., "Rethinking Attention with Performers", 2021, figure 3',
    rows=[*rows(FORWARD), *rows(BOTH)],
    lengths=doubling(512, 16384),
    quick=doubling(512, 2048),
    packages=("torch", "llvmlite", "performer-pytorch"),
    baselines=["X-OPT: attention replaced by v"],
)
