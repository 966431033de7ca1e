"""SmolLM2-135M: a causal language model of 30 layers with 9 query heads and 3 key heads, from a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from asv_benchmarks.quality.packages import SMOLLM2, find

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT, BLOCK = 8192, 512  # longest sequence it was trained on; tokens whose logits are formed at once
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


class SmolLM2:
    """The weights in float32, the tokenizer, and a forward pass whose attention is an argument."""

    def __init__(self) -> None:
        from gguf import GGUFReader
        from gguf.quants import dequantize

        reader = GGUFReader(find(SMOLLM2, FILE))
        about = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items() if "llama" in name}
        self.layers, self.epsilon = about["block_count"], about["attention.layer_norm_rms_epsilon"]
        self.heads, self.key_heads = about["attention.head_count"], about["attention.head_count_kv"]
        self.base, self.d = about["rope.freq_base"], about["rope.dimension_count"]
        self.weights = {x.name: torch.tensor(dequantize(x.data, x.tensor_type)) for x in reader.tensors}
        vocabulary, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
        self.tokenizer = _tokenizer(vocabulary, merges)

    def encode(self, text: str, n: int) -> torch.Tensor:
        """The first `n` tokens of the text, shape (n,).

        Raises
        ------
        ValueError
            If the text has fewer tokens.
        """
        tokens = self.tokenizer.encode(text).ids[:n]
        if len(tokens) < n:
            msg = f"the text has {len(tokens)} tokens; expected {n} or more: name a longer text or a smaller length"
            raise ValueError(msg)
        return torch.tensor(tokens)

    @torch.no_grad()
    def hidden(self, tokens: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The normalised states after the last layer, (n, 576), with `attend(q, k, v, layer)` as causal attention.

        q has the shape (1, 9, n, 64), k and v have (1, 3, n, 64); queries and keys are rotated by position.
        """
        w, x = self.weights, self.weights["token_embd.weight"][tokens]
        rotation = self._rotation(len(tokens))
        for layer in range(self.layers):
            at = f"blk.{layer}."
            y = self._norm(x, w[f"{at}attn_norm.weight"])
            q, k, v = (self._heads(y @ w[f"{at}attn_{name}.weight"].T) for name in "qkv")
            out = attend(_rotate(q, rotation), _rotate(k, rotation), v, layer)
            x = x + out[0].transpose(0, 1).reshape(len(tokens), -1) @ w[f"{at}attn_output.weight"].T
            y = self._norm(x, w[f"{at}ffn_norm.weight"])
            gate, up = (y @ w[f"{at}ffn_{name}.weight"].T for name in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ w[f"{at}ffn_down.weight"].T
        return self._norm(x, w["output_norm.weight"])

    @torch.no_grad()
    def losses(self, tokens: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The negative log-likelihood in nats of each token but the first, (n − 1,), given the tokens before it."""
        hidden, table = self.hidden(tokens, attend)[:-1], self.weights["token_embd.weight"]
        pairs = zip(hidden.split(BLOCK), tokens[1:].split(BLOCK), strict=True)
        return torch.cat([F.cross_entropy(x @ table.T, y, reduction="none") for x, y in pairs])

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.epsilon)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(n, heads · d) as (1, heads, n, d)."""
        return x.reshape(1, len(x), -1, self.d).transpose(1, 2)

    def _rotation(self, n: int) -> torch.Tensor:
        """The factor e^(i t base^(−2j/d)) of position t and pair j as a complex number, (n, d / 2)."""
        frequency = self.base ** -(torch.arange(0, self.d, 2, dtype=torch.float64) / self.d)
        angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
    """Causal softmax attention by the library's fused function."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbouring channels (2j, 2j + 1), as llama's GGUF files order them."""
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)


def _tokenizer(vocabulary: list[str], merges: list[str]) -> Any:
    """Byte-level BPE with every digit a word of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ranks = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ranks, [tuple(x.split(" ")) for x in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
