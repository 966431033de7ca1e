"""Longformer's attention, by `subquad.Window` with global tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import subquad
from subquad_torch.transformers.accelerate.attention_core import AttentionCore, heads, joined


class LongformerAttention(AttentionCore):
    """A window on both sides and global tokens with projections of their own [1]_.

        out[i] = softmax(q[i] kᵀ / √d, over keys within the window and global ones) v
        out[g] = softmax(q_global[g] k_globalᵀ / √d) v_global    for global tokens g

    Outputs of tokens that are no padding are those of the original. Attention of padded tokens is not 0 here, and read
    by none.

    References
    ----------
    .. [1] I. Beltagy et al., "Longformer", 2020, section 3.
    """

    needs = ("is_index_masked", "is_index_global_attn", "is_global_attn")
    query: Any
    key: Any
    value: Any
    query_global: Any
    key_global: Any
    value_global: Any
    num_heads: int
    one_sided_attn_window_size: int
    dropout: float

    @property
    def subquad_runs(self) -> str:
        return f"window, left={self.one_sided_attn_window_size}, right={self.one_sided_attn_window_size}, global tokens"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        is_index_masked: Any = None,
        is_index_global_attn: Any = None,
        is_global_attn: Any = None,
        output_attentions: bool = False,
    ) -> Any:
        self.subquad_check(self.dropout, output_attentions)
        x, left = hidden_states, self.one_sided_attn_window_size
        q, k, v = (heads(to(x), self.num_heads) for to in (self.query, self.key, self.value))
        special: dict[str, Any] = {}
        if is_global_attn:
            to_global = self.query_global, self.key_global, self.value_global
            special["global_qkv"] = tuple(heads(to(x), self.num_heads) for to in to_global)
            special["global_mask"] = is_index_global_attn[:, None]
        visible = None if is_index_masked is None or not bool(is_index_masked.any()) else ~is_index_masked[:, None]
        return (joined(subquad.Window(left, right=left, **special)(q, k, v, key_mask=visible)),)
