"""Reformer's attention by hashing, by `subquad.LSH`."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

import subquad
from subquad_torch.transformers.accelerate.attention_core import AttentionCore, heads, joined


class ReformerAttention(AttentionCore):
    """Attention to keys of near buckets, with one projection for queries and keys [1]_.

        q = query_key(x),    k = q / |q|,    out = lsh(q, k, v),    no token sees itself unless it sees no other

    The original draws rotations anew at each call, from the global generator of PyTorch, which ``hash_seed`` sets; a
    pair that meets in several rounds counts as often, and the first chunk sees the last one. Here rotations come from
    ``hash_seed`` and the number of the layer, so that a call can be repeated, and a pair counts once. Up to the length
    of a chunk either is exact attention. Steps of `generate` after the prompt run by the original, as do the buckets
    that these read; layers of the type "local" are exact in the original, and are left to it.

    References
    ----------
    .. [1] N. Kitaev, Ł. Kaiser, A. Levskaya, "Reformer: The Efficient Transformer", 2020, section 2.
    """

    needs = ("num_hashes", "buckets", "past_buckets_states")
    query_key: Any
    value: Any
    num_attention_heads: int
    num_hashes: int
    chunk_length: int
    hash_seed: int | None
    layer_idx: int
    is_decoder: bool
    dropout: float
    num_buckets: Any

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        before, after = module.num_chunks_before, module.num_chunks_after
        if (before, after) == (1, 0):
            return None
        return f"a chunk of it reads {before} chunks before and {after} after its own; subquad.LSH reads 1 and 0"

    @property
    def subquad_runs(self) -> str:
        return f"lsh, bucket_size={self.chunk_length}, num_rounds={self.num_hashes}"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        num_hashes: int | None = None,
        buckets: Any = None,
        past_buckets_states: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        if past_buckets_states is not None and len(past_buckets_states) > self.layer_idx:
            return super().forward(
                hidden_states, attention_mask, num_hashes, buckets, past_buckets_states, use_cache, output_attentions,
                **kwargs,
            )  # fmt: skip
        self.subquad_check(self.dropout, output_attentions)
        q, v = (heads(to(hidden_states), self.num_attention_heads) for to in (self.query_key, self.value))
        n, rounds = hidden_states.shape[1], self.num_hashes if num_hashes is None else num_hashes
        method = subquad.LSH(
            self.chunk_length, rounds, (self.hash_seed or 0) + self.layer_idx, shared_qk=True, unit_keys=True,
            allow_self=False,
        )  # fmt: skip
        visible = None if attention_mask is None else attention_mask[:, None].bool()
        out = joined(method(q, q, v, key_mask=visible, scale=1.0, causal=self.is_decoder))
        made = None
        # what the original's steps after the prompt read
        if use_cache and self.is_decoder and past_buckets_states is not None and n > self.chunk_length:
            whole: Any = self
            if self.num_buckets is None:
                whole._set_num_buckets(n)
            made = whole._hash_vectors(q, rounds, attention_mask).view(*q.shape[:2], rounds, n)
        answer = sys.modules[self.original.__module__].LSHSelfAttentionOutput
        return answer(hidden_states=out, attention_probs=(), buckets=made)
