"""The mask function that transformers calls once for each forward pass and kind of layer: it returns a `MaskPattern`.

transformers says what is seen by a function of indices that is put together from a few of its own: causal, a sliding
window, chunks, packed documents. These are recognised. From any other function the matrix is made, which is what
transformers itself does, and which only "exact" takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from subquad_torch.transformers.pattern import MaskPattern


class Rules(NamedTuple):
    """What the parts of a mask function say."""

    causal: bool = False
    left: int | None = None
    right: int | None = None
    chunks: tuple[int, Tensor] | None = None  # their size, and the padding before the first one, (batch,)
    documents: Tensor | None = None  # their numbers, (batch, q_length)
    positions: Tensor | None = None  # of the tokens in their documents, (batch, q_length)


def mask_pattern(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Any = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    device: Any = "cpu",
    **_: Any,
) -> MaskPattern:
    """The pattern of `mask_function` for these queries and keys, with padding from the 2-D `attention_mask`."""
    if isinstance(attention_mask, MaskPattern):  # made before the forward pass, by `generate` with a static cache
        return attention_mask
    if isinstance(q_offset, Tensor) and not is_tracing(q_offset):
        q_offset = int(q_offset)
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    sizes |= {"q_offset": q_offset, "kv_offset": kv_offset}
    if torch.compiler.is_compiling():
        skips = allow_is_causal_skip, allow_is_bidirectional_skip
        rules = _rules_of_call(mask_function, *skips, local_size, getattr(config, "attention_chunk_size", None))
    else:
        rules = _rules(mask_function)
    if rules is None:
        pairs = masking_utils.sdpa_mask(
            **sizes, mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False,
            use_vmap=use_vmap, device=device,
        )  # fmt: skip
        if q_length == 1 and pairs.shape[1] == 1:  # a row is a mask of keys, which every method takes
            return MaskPattern(**sizes, key_mask=pairs[:, 0, 0])
        return MaskPattern(**sizes, pairs=pairs)
    pattern = MaskPattern(
        **sizes,
        causal=rules.causal,
        left=rules.left,
        right=rules.right,
        segments=_segments(rules, sizes, device),
        key_mask=_key_mask(attention_mask, kv_length, kv_offset),
    ).at_end()
    mask = pattern.key_mask
    if mask is not None and not is_tracing(mask) and bool(mask.all()):
        return replace(pattern, key_mask=None)
    return pattern


def _key_mask(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """The 2-D mask of the keys that the layer has; those after its end are hidden."""
    if attention_mask is None:
        return None
    missing = max(0, kv_length + kv_offset - attention_mask.shape[-1])
    mask = pad(attention_mask, (0, missing)) if missing else attention_mask
    return mask[:, kv_offset : kv_offset + kv_length].bool()


def _segments(rules: Rules, sizes: Mapping[str, Any], device: Any) -> tuple[Tensor, Tensor] | None:
    """Numbers of the documents, or of the chunks of each, of queries and keys."""
    if rules.chunks is None:
        return None if rules.documents is None else (rules.documents, rules.documents)
    size, padding = rules.chunks
    if rules.documents is not None and rules.positions is not None:
        chunk = rules.positions // size + rules.documents * (sizes["q_length"] + 1)
        return chunk, chunk
    of_queries, of_keys = (
        torch.div(torch.arange(sizes[f"{x}_length"], device=device) + sizes[f"{x}_offset"] - padding[:, None], size,
                  rounding_mode="floor")
        for x in ("q", "kv")
    )  # fmt: skip
    return of_queries, of_keys


def _rules_of_call(
    function: Callable[..., Any], causal: bool, bidirectional: bool, size: int | None, chunk_size: int | None
) -> Rules | None:
    """What a mask function says in a program that is traced, where the parts of a function cannot be read.

    transformers allows to skip a mask only if it is plainly causal, or plainly bidirectional, up to the window.
    """
    if function is masking_utils.causal_mask_function:
        return Rules(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Rules()
    if size is None or chunk_size is not None or not (causal or bidirectional):
        return None
    return Rules(causal=True, left=size - 1) if causal else Rules(left=size, right=size)


def _rules(function: Callable[..., Any]) -> Rules | None:
    """What a mask function says, if all its parts are known; else None."""
    if function is masking_utils.causal_mask_function:
        return Rules(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Rules()
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    held = dict(zip(function.__code__.co_freevars, (x.cell_contents for x in function.__closure__ or ()), strict=True))
    match function.__qualname__.split(".")[0], held:
        case "and_masks", {"mask_functions": parts}:
            return _all(parts)
        case "sliding_window_overlay", {"sliding_window": int(size)}:
            return Rules(left=size - 1)
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(size)}:
            return Rules(left=size, right=size)
        case "chunked_overlay", {"chunk_size": int(size), "left_padding": padding}:
            return Rules(chunks=(size, padding))
        case "packed_sequence_mask_function", {"packed_sequence_mask": documents}:
            return Rules(documents=documents)
        case "remap_positions_for_packed_sequence", {"mask_function": inner, "position_ids": positions}:
            rules = _rules(inner)
            return None if rules is None else rules._replace(positions=positions)
    return None


def _all(parts: Any) -> Rules | None:
    """What several functions say together; None if one is not known, or two say the one thing."""
    together: dict[str, Any] = {}
    for part in parts:
        rules = _rules(part)
        if rules is None:
            return None
        said = {name: x for name, x in rules._asdict().items() if x is not None and x is not False}
        if together.keys() & said.keys() - {"causal"}:
            return None
        together |= said
    return Rules(**together)
