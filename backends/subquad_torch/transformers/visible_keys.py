"""The pattern of one call of an attention function, from whatever the model handed on as its mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subquad_torch.transformers.pattern import MaskPattern


def pattern_of_call(
    module: Any, query: Tensor, key: Tensor, mask: Any, *, is_causal: bool | None, sliding_window: int | None,
    cu_seq_lens: tuple[Tensor | None, Tensor | None], position_ids: Any,
) -> MaskPattern:  # fmt: skip
    """The pattern; ValueError if a mask does not fit the queries and keys, TypeError if it is none."""
    sizes = {"batch_size": query.shape[0], "q_length": query.shape[2], "kv_length": key.shape[2]}
    if isinstance(mask, MaskPattern):
        pattern = _fit(mask, sizes)
    elif mask is None:
        pattern = _without_mask(module, sizes, is_causal, sliding_window)
    elif isinstance(mask, Tensor):
        pattern = _of_tensor(mask, sizes)
    else:
        msg = f"attention_mask is a {type(mask).__name__}, expected a Tensor, or None"
        raise TypeError(msg)
    return _with_positions(_with_documents(pattern, cu_seq_lens), position_ids)


def _fit(pattern: MaskPattern, sizes: dict[str, int]) -> MaskPattern:
    """The pattern, if it was made for as many queries and keys; queries count where they differ in what they see."""
    by_place = pattern.causal or pattern.left is not None or pattern.right is not None
    by_query = by_place or pattern.segments is not None or pattern.pairs is not None
    n, n_kv = pattern.q_length, pattern.shape[-1]
    if n_kv != sizes["kv_length"] or (by_query and n != sizes["q_length"]):
        msg = (
            f"the mask is for {n} queries and {n_kv} keys, and the layer has {sizes['q_length']} and "
            f"{sizes['kv_length']}: the model made it for a layer of another kind"
        )
        raise ValueError(msg)
    return pattern if n == sizes["q_length"] else replace(pattern, q_length=sizes["q_length"])


def _without_mask(module: Any, sizes: dict[str, int], is_causal: bool | None, window: int | None) -> MaskPattern:
    """The pattern where the model made no mask: the layer's own causality and window, as in transformers' sdpa."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    n, n_kv = sizes["q_length"], sizes["kv_length"]
    if causal and n not in (1, n_kv):
        msg = (
            f"{type(module).__name__} is causal, has {n} queries and {n_kv} keys, and no mask that says which keys "
            f"come after a query; pass an attention_mask of 4 axes, (batch, 1, {n}, {n_kv}), bool with True = keep"
        )
        raise ValueError(msg)
    size = None if window is None else window - 1
    return MaskPattern(**sizes, q_offset=n_kv - n, causal=causal, left=size, right=None if causal else size)


def _of_tensor(mask: Tensor, sizes: dict[str, int]) -> MaskPattern:
    """The pattern of a mask that a user passed, or that a model made itself."""
    n, n_kv = sizes["q_length"], sizes["kv_length"]
    if mask.ndim == 2 and mask.shape[-1] == n_kv and not mask.dtype.is_floating_point:
        return MaskPattern(**sizes, q_offset=n_kv - n, key_mask=mask.bool())
    if mask.ndim != 4 or mask.shape[-1] not in (1, n_kv) or mask.shape[-2] not in (1, n):
        msg = f"attention_mask has shape {tuple(mask.shape)}, expected (batch, heads or 1, {n}, {n_kv})"
        raise ValueError(msg)
    if mask.dtype == torch.bool:
        if mask.shape[1] == mask.shape[2] == 1:
            return MaskPattern(**sizes, q_offset=n_kv - n, key_mask=mask[:, 0, 0].expand(-1, n_kv))
        return MaskPattern(**sizes, q_offset=n_kv - n, pairs=mask)
    if not mask.dtype.is_floating_point:
        msg = f"attention_mask has dtype {mask.dtype}, expected bool with True = keep, or an additive mask of floats"
        raise TypeError(msg)
    if mask.shape[1] == mask.shape[2] == 1 and not mask.requires_grad:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not torch.compiler.is_compiling() and bool(((mask == 0) | hidden).all()):
            return MaskPattern(**sizes, q_offset=n_kv - n, key_mask=~hidden[:, 0, 0].expand(-1, n_kv))
    return MaskPattern(**sizes, q_offset=n_kv - n, bias=mask)


def _with_documents(pattern: MaskPattern, cu_seq_lens: tuple[Tensor | None, Tensor | None]) -> MaskPattern:
    """The pattern with the documents that the lengths of FlashAttention's calls tell, if the pattern has none."""
    of_queries, of_keys = cu_seq_lens
    if of_queries is None or pattern.segments is not None:
        return pattern
    if pattern.batch_size != 1:
        msg = f"cu_seq_lens_q numbers the documents of one sequence, and the batch has {pattern.batch_size}; flatten it"
        raise ValueError(msg)
    ends = of_queries, of_queries if of_keys is None else of_keys
    numbers = [_numbers(x, n) for x, n in zip(ends, (pattern.q_length, pattern.kv_length), strict=True)]
    return replace(pattern, segments=(numbers[0], numbers[1]))


def _numbers(ends: Tensor, n: int) -> Tensor:
    """Number of the document of each row, (1, n), from the cumulative lengths 0 … n."""
    places = torch.arange(n, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends[1:].contiguous(), places, right=True)[None]


def _with_positions(pattern: MaskPattern, position_ids: Any) -> MaskPattern:
    """The pattern with the documents of packed position ids, which begin again at each, if it says nothing else.

    Some models (GPT-OSS) do not hand position ids to their masks. Ids that jump ahead are one document with gaps, as
    ids that stretch the context are. A program that is traced cannot ask whether ids are packed.
    """
    n, says = pattern.q_length, (pattern.segments, pattern.key_mask, pattern.pairs, pattern.bias)
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[-1] != n:
        return pattern
    if torch.compiler.is_compiling() or any(x is not None for x in says):
        return pattern
    if not pattern.causal or pattern.kv_length != n:
        return pattern
    begins = torch.diff(position_ids, dim=-1) <= 0
    if not bool(begins.any()):
        return pattern
    numbers = torch.nn.functional.pad(torch.cumsum(begins, -1), (1, 0)).expand(pattern.batch_size, -1)
    return replace(pattern, segments=(numbers, numbers))
