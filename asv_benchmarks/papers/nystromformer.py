"""Nyströmformer's table of time and memory against length (Xiong et al., 2021), for self-attention of one instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import subquad
from asv_benchmarks.harness import Run, doubling
from asv_benchmarks.papers.paper import Paper, Row
from asv_benchmarks.peers.attention import bypass, heads_last, transformers_nystrom

HEADS, D = 8, 64


def draw(n: int) -> list[Tensor]:
    """q, k, v of one instance."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn((3, 1, HEADS, n, D), generator=generator).unbind())


def of(make: Callable[[Tensor, Tensor, Tensor], Run]) -> Callable[[int], Run]:
    """The `make` of a row from a function of q, k and v; calls record nothing for gradients."""

    def of_length(n: int) -> Run:
        call = torch.no_grad()(make(*draw(n)))
        return lambda: call()

    return of_length


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """A call of the paper's exact attention, which forms the n × n matrix of weights."""
    return lambda: torch.softmax((q * D**-0.5) @ k.mT, dim=-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Run:
    return lambda: scaled_dot_product_attention(q, k, v)


def linformer(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """A call of the core of the package's layer: its projections return q, k and v, and the output is not projected."""
    from linformer import LinformerSelfAttention

    layer = LinformerSelfAttention(HEADS * D, q.shape[-2], k=256, heads=HEADS).eval()
    bypass(layer, to_q=heads_last(q), to_k=heads_last(k), to_v=heads_last(v))
    layer.to_out = torch.nn.Identity()
    hidden = heads_last(q)
    return lambda: layer(hidden)


def longformer(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """A call of the core of transformers' layer, with 128 keys to each side and no global tokens.

    The layer divides its queries in place, so each call copies them: n × 512 numbers.
    """
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(hidden_size=HEADS * D, num_attention_heads=HEADS, attention_window=[256])
    layer = LongformerSelfAttention(config, 0).eval()
    queries, keys, values = (heads_last(x).transpose(0, 1).contiguous() for x in (q, k, v))
    bypass(layer, query=queries, key=keys, value=values)
    object.__setattr__(layer, "query", lambda _: queries.clone())
    hidden, n = heads_last(q), q.shape[-2]
    visible, nothing = torch.zeros(1, n), torch.zeros(1, n, dtype=torch.bool)
    masks: dict[str, Any] = {"attention_mask": visible, "is_index_masked": nothing, "is_index_global_attn": nothing}
    return lambda: layer(hidden, is_global_attn=False, **masks)[0]


def ours(method: subquad.Method) -> Callable[[Tensor, Tensor, Tensor], Run]:
    return lambda q, k, v: lambda: subquad.attention(q, k, v, method)


def ours_linformer(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """A call with the random projections with which the package's layer begins."""
    E, F = (torch.rand((256, k.shape[-2]), generator=torch.Generator().manual_seed(i)) / 8 - 1 / 16 for i in (0, 1))
    return ours(subquad.Linformer(projection=(E, F)))(q, k, v)


LONGEST = 131072
UNFUSED, FUSED = "Transformer, unfused", "Transformer, fused (torch SDPA)"
PAPER = Paper(
    title=f"Nyströmformer: one instance, {HEADS} heads of {D} channels, float32, forward",
    source='Y. Xiong et al., "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention", 2021',
    rows=[
        Row(UNFUSED, of(unfused), 8192),
        Row(FUSED, of(fused), 16384),
        Row("Linformer-256 (linformer)", of(linformer), LONGEST),
        Row("Longformer-257 (transformers)", of(longformer), 32768),
        Row("Nyströmformer-64 (transformers)", of(transformers_nystrom), LONGEST),
        Row("Linformer-256, subquad", of(ours_linformer), LONGEST),
        Row("Longformer-257, subquad", of(ours(subquad.Window(left=128))), LONGEST),
        Row("Nyströmformer-64, subquad", of(ours(subquad.Nystrom(num_landmarks=64))), LONGEST),
        Row("Nyströmformer-32, subquad", of(ours(subquad.Nystrom(num_landmarks=32))), LONGEST),
    ],
    lengths=doubling(512, LONGEST),
    quick=doubling(512, 2048),
    packages=("torch", "llvmlite", "linformer", "transformers"),
    baselines=[UNFUSED, FUSED],
    notes=[
        "Linformer and Longformer have 256 projected keys, and 128 keys to each side of a query.",
        "Of every layer the attention core alone: no projections, no residual convolution.",
    ],
    summary=8192,
    instance_bytes=4 * 4 * HEADS * D,  # q, k, v and the output
)
