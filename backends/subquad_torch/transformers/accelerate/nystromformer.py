"""Nyströmformer's attention, by `subquad.Nystrom`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import subquad
from subquad_torch.transformers.accelerate.attention_core import AttentionCore, heads, joined, key_mask


class NystromformerAttention(AttentionCore):
    """Nyström attention [1]_ with a convolution of the values.

        q, k, v = query(x), key(x), value(x)
        out = nystrom(q, k, v; num_landmarks) + conv(v)

    Of the original it does not repeat these: with as many landmarks as ``segment_means_seq_len`` it is exact attention
    *and stays so here*; otherwise the length must divide by that number, or rows of a batch are mixed without a word, a
    padding mask raises, padding enters the landmarks, and the start of the pseudo-inverse depends on the whole batch.
    Padding enters its convolution in either case. Here any length is taken, padding has no influence, and each matrix
    has a start of its own, so that outputs differ from the original's by what six iterations leave of the start.

    References
    ----------
    .. [1] Y. Xiong et al., "Nyströmformer", 2021.
    """

    query: Any
    key: Any
    value: Any
    conv: Any
    num_attention_heads: int
    num_landmarks: int
    seq_len: int
    conv_kernel_size: int | None
    reads = ("conv",)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        size = module.conv_kernel_size
        return None if size is None or size % 2 else f"its convolution has an even size, {size}"

    @property
    def subquad_runs(self) -> str:
        return "exact" if self.num_landmarks == self.seq_len else f"nystrom, num_landmarks={self.num_landmarks}"

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, output_attentions: bool = False) -> Any:
        self.subquad_check(0.0, output_attentions)
        q, k, v = (heads(to(hidden_states), self.num_attention_heads) for to in (self.query, self.key, self.value))
        n = hidden_states.shape[1]
        weights = None if self.conv_kernel_size is None else self.conv.weight[:, 0, :, 0]
        # with a landmark for each row the method is exact attention
        method = subquad.Nystrom(n if self.num_landmarks == self.seq_len else self.num_landmarks, conv_weights=weights)
        return (joined(method(q, k, v, key_mask=key_mask(attention_mask))),)
