"""The packages that people use today, beside ours: same inputs, one process, interleaved.

A peer is one entry of `PEERS`: how it is called on (batch, heads, n, d) tensors, and the call of ours that computes
the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Run = Callable[[], Any]
Make = Callable[[Any, Any, Any], Run]  # of tensors q, k, v


@dataclass(frozen=True)
class Peer:
    """One peer: `theirs(q, k, v)` makes a call of no arguments; `method`, `options` and `causal` are ours."""

    name: str
    theirs: Make
    method: str
    options: dict[str, Any]
    causal: bool = False


def _performer(q: Any, k: Any, v: Any) -> Run:
    from performer_pytorch import FastAttention

    layer = FastAttention(q.shape[-1], nb_features=256).eval()
    return lambda: layer(q, k, v)


def _performer_causal(q: Any, k: Any, v: Any) -> Run:
    from performer_pytorch import FastAttention
    from performer_pytorch.performer_pytorch import causal_linear_attention_noncuda

    layer = FastAttention(q.shape[-1], nb_features=256, causal=True).eval()
    layer.causal_linear_fn = causal_linear_attention_noncuda
    return lambda: layer(q, k, v)


def _transformers_nystrom(q: Any, k: Any, v: Any) -> Run:
    """The attention core of the layer: projections that return q, k, v, and no convolution."""
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    heads, n, d = q.shape[1:]
    config = NystromformerConfig(
        hidden_size=heads * d, num_attention_heads=heads, num_landmarks=64, segment_means_seq_len=n
    )
    layer = NystromformerSelfAttention(config).eval()
    layer.conv_kernel_size = None
    for name, x in (("query", q), ("key", k), ("value", v)):
        layer._modules.pop(name)
        object.__setattr__(layer, name, _constant(_heads_last(x)))
    hidden = _heads_last(q)
    return lambda: layer(hidden)[0]


def _nystrom_attention(q: Any, k: Any, v: Any) -> Run:
    """The attention core of the layer: a projection that returns q, k, v, no output projection, no convolution."""
    import torch
    from nystrom_attention import NystromAttention

    heads, _, d = q.shape[1:]
    layer = NystromAttention(dim=heads * d, dim_head=d, heads=heads, num_landmarks=64, residual=False).eval()
    joined = torch.cat([_heads_last(x) for x in (q, k, v)], dim=-1)
    layer._modules.pop("to_qkv")
    object.__setattr__(layer, "to_qkv", _constant(joined))
    layer.to_out = torch.nn.Identity()
    hidden = _heads_last(q)
    return lambda: layer(hidden)


def _heads_last(x: Any) -> Any:
    """(batch, heads, n, d) → (batch, n, heads · d)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


PEERS = (
    Peer("performer-pytorch FastAttention", _performer, "favor", {"num_features": 256}),
    Peer("performer-pytorch causal (no CUDA)", _performer_causal, "favor", {"num_features": 256}, causal=True),
    Peer("transformers Nyströmformer core", _transformers_nystrom, "nystrom", {"num_landmarks": 64}),
    Peer("nystrom-attention core", _nystrom_attention, "nystrom", {"num_landmarks": 64}),
)
