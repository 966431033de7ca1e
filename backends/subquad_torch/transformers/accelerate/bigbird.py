"""BigBird's block-sparse attention, by `subquad.BigBird`, and the model around it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import subquad
from subquad_torch.transformers.accelerate.attention_core import AttentionCore, heads, joined
from subquad_torch.transformers.accelerate.swap import Swapped

OLD_LENGTHS = (1024, 3072, 4096)  # for which the original has plans of another kind


class BigBirdAttention(AttentionCore):
    """Near, global and random blocks of keys [1]_.

        out = softmax(q kᵀ / √d, over the keys of the blocks of a row) v

    The random blocks are those that the original draws in training, from the seed of the layer. In evaluation the
    original reads block 0 in place of each random block, and counts it again each time; in training it leaves
    NumPy's global generator changed; it lowers the logits of padding by 10000. Here training and evaluation have one
    plan, each key counts once, the generator is as it was, and padding has no influence. Sequences of no more blocks
    than a row may read are exact attention.

    References
    ----------
    .. [1] M. Zaheer et al., "Big Bird: Transformers for Longer Sequences", 2020.
    """

    needs = ("to_mask", "to_blocked_mask")
    query: Any
    key: Any
    value: Any
    num_attention_heads: int
    num_random_blocks: int
    block_size: int
    max_seqlen: int
    seed: int

    @property
    def subquad_runs(self) -> str:
        return f"bigbird, block_size={self.block_size}, num_random_blocks={self.num_random_blocks}"

    def forward(
        self,
        hidden_states: Tensor,
        band_mask: Any = None,
        from_mask: Any = None,
        to_mask: Any = None,
        from_blocked_mask: Any = None,
        to_blocked_mask: Any = None,
        output_attentions: Any = None,
        **_: Any,
    ) -> Any:
        self.subquad_check(0.0, output_attentions)
        q, k, v = (heads(to(hidden_states), self.num_attention_heads) for to in (self.query, self.key, self.value))
        visible = None if to_mask is None else to_mask[:, :, 0] > 0
        n = hidden_states.shape[1]
        if n <= (5 + 2 * self.num_random_blocks) * self.block_size:
            return joined(subquad.attention(q, k, v, "exact", key_mask=visible)), None
        sizes = n, self.block_size, self.num_random_blocks, self.num_attention_heads, self.max_seqlen, self.seed
        plan = torch.from_numpy(plan_of_training(self.original, *sizes)).to(q.device)
        method = subquad.BigBird(self.block_size, num_random_blocks=self.num_random_blocks, plan=plan)
        return joined(method(q, k, v, key_mask=visible)), None


@lru_cache(maxsize=256)
def plan_of_training(
    original: Any, n: int, size: int, count: int, num_heads: int, longest: int, seed: int
) -> np.ndarray[Any, Any]:
    """The random blocks (heads, blocks, count) that the original draws in training, −1 for the global rows."""
    drawer = original.__new__(original)
    drawer.training = True  # in evaluation it draws none
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        if n in OLD_LENGTHS:
            rows = [
                drawer._bigbird_block_rand_mask(longest, longest, size, size, count, last_idx=1024)[: n // size - 2]
                for _ in range(num_heads)
            ]
        else:
            lengths, counts = drawer._get_rand_attn_plan(n, size, count)
            rows = drawer._bigbird_block_rand_mask_with_head(n, n, size, size, num_heads, lengths, counts)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return np.pad(np.stack(rows).astype(np.int64), ((0, 0), (1, 1), (0, 0)), constant_values=-1)


class BigBirdWhole(Swapped):
    """The model, which keeps its sparse attention: the original replaces it for good at the first short sequence."""

    needs = ("attention_mask",)
    config: Any

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if module.config.is_decoder:
            return "block-sparse attention is bidirectional, and a decoder has full attention in transformers"
        if module.attention_type != "block_sparse":
            return f"its attention_type is {module.attention_type!r}; set_attention_type('block_sparse') comes first"
        return None

    @property
    def subquad_runs(self) -> None:  # type: ignore[override]
        """None: its layers run something, the model itself does not."""

    def set_attention_type(self, value: str) -> None:
        """Set the attention type; "original_full", which short sequences ask for, is what they get in any case."""
        if value != "original_full":
            super().set_attention_type(value)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)
