"""MiniLM-L6: a bidirectional encoder of sentences, 6 layers of 12 heads, from a safetensors file."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from asv_benchmarks.quality.packages import MINILM, find
from asv_benchmarks.quality.smollm2 import Attend

CONTEXT = 512  # longest sequence
LAYERS, HEADS, EPSILON = 6, 12, 1e-12


class MiniLM:
    """The weights in float32, the tokenizer, and a forward pass whose attention is an argument."""

    def __init__(self) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        self.weights = load_file(find(MINILM, "model/model.safetensors"))
        self.tokenizer = Tokenizer.from_file(str(find(MINILM, "model/tokenizer.json")))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def chunks(self, text: str, count: int, n: int = CONTEXT) -> torch.Tensor:
        """The first `count` stretches of n tokens of the text, (count, n), each with the marks of its start and end.

        Raises
        ------
        ValueError
            If the text is shorter.
        """
        start, *tokens, end = self.tokenizer.encode(text).ids
        inside = n - 2
        if len(tokens) < count * inside:
            msg = f"the text has {len(tokens)} tokens; expected {count} × {inside} or more: name a longer text"
            raise ValueError(msg)
        return torch.tensor([[start, *tokens[i * inside :][:inside], end] for i in range(count)])

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The embeddings of unit length of sequences of tokens (batch, n): mean over tokens, (batch, 384).

        `attend(q, k, v, layer)` is called with three arrays (batch, 12, n, 32).
        """
        w = self.weights
        word, place, kind = (w[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type"))
        x = self._norm(word[tokens] + place[: tokens.shape[1]] + kind[0], "embeddings.LayerNorm")
        for layer in range(LAYERS):
            at = f"encoder.layer.{layer}."
            q, k, v = (
                self._linear(x, f"{at}attention.self.{name}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            out = attend(q, k, v, layer).transpose(1, 2).flatten(-2)
            x = self._norm(x + self._linear(out, f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm")
            y = self._linear(F.gelu(self._linear(x, f"{at}intermediate.dense")), f"{at}output.dense")
            x = self._norm(x + y, f"{at}output.LayerNorm")
        return F.normalize(x.mean(dim=1), dim=-1)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], EPSILON)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
    """Softmax attention to all tokens by the library's fused function."""
    return F.scaled_dot_product_attention(q, k, v)
