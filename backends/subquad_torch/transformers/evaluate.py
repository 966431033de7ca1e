"""Attention of one call by a method, under a pattern: what the method takes is passed on, the rest is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subquad.attention import Exact, Method, Window
from subquad_torch.transformers.pattern import MaskPattern

# causal methods whose blocks, clusters or chunks are counted from the first row, padding included
COUNTED = ("BigBird", "Clustered", "LSH", "Auto")
EXACT = Exact()


def evaluate(
    method: Method, options: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor, pattern: MaskPattern, *,
    scale: float | None, softcap: float | None, sinks: Tensor | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The output (batch, heads, n, d_v). NotImplementedError names what the method cannot do.

    `options` are those that the user gave, which tell a chosen window from a default one.
    """
    if pattern.kv_length < k.shape[2]:  # a cache of fixed size, whose last places are empty
        k, v = k[:, :, : pattern.kv_length], v[:, :, : pattern.kv_length]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., : pattern.kv_length]
    if pattern.bias is not None:
        bias = pattern.bias if bias is None else bias + pattern.bias
        pattern = replace(pattern, bias=None)
    method, pattern, visible = _with_window(method, options, pattern)
    if softcap is not None or bias is not None or pattern.pairs is not None:
        if not isinstance(method, Exact):
            what = ("softcap", "a bias of logits (position_bias, or an additive mask)", "a mask of pairs")
            given = (softcap, bias, pattern.pairs)
            named = next(x for x, y in zip(what, given, strict=True) if y is not None)
            msg = f"{type(method).__name__} cannot take {named}; 'subquad-exact' takes it"
            if torch.compiler.is_compiling() and pattern.pairs is not None:
                msg += ". A compiled program makes pairs of position ids: pass an attention_mask of ones as well"
            raise NotImplementedError(msg)
        if pattern.cuts(pattern.left, pattern.right):
            pattern = replace(pattern, pairs=pattern.matrix())
    elif isinstance(method, Exact) and pattern.cuts(pattern.left, pattern.right):
        method = Window(pattern.left if pattern.left is not None else pattern.kv_length, right=_right(pattern))
    arguments: dict[str, Any] = {"scale": scale}
    if pattern.pairs is not None:
        arguments["mask"] = pattern.pairs
    else:
        arguments |= _visible_keys(method, pattern, visible)
    arguments |= {name: x for name, x in (("softcap", softcap), ("bias", bias)) if x is not None}
    if sinks is None:
        return method(q, k, v, **arguments)
    return _with_sinks(method, q, k, v, sinks, arguments)


def _right(pattern: MaskPattern) -> int | None:
    if pattern.causal:
        return None
    return pattern.kv_length if pattern.right is None else pattern.right


def _with_window(
    method: Method, options: Mapping[str, Any], pattern: MaskPattern
) -> tuple[Method, MaskPattern, Tensor | None]:
    """The method with the window of the layer, the pattern, and counts of visible keys in a program that is traced."""
    own = None
    if isinstance(method, Window):
        own = method.left if "left" in options or pattern.left is None else None
    visible = None
    if isinstance(pattern.q_offset, Tensor):
        counts = type(method).__name__ in COUNTED
        if pattern.q_length == 1 and pattern.segments is None and not counts:
            pattern = pattern.one_query(own)
            return (EXACT if isinstance(method, Window) else method), pattern, None
        if not isinstance(method, Exact | Window) or pattern.segments is not None:
            msg = (
                f"{type(method).__name__} with a cache of fixed size in a compiled program, whose places it cannot "
                f"read; use a dynamic cache, or 'exact' or 'window'"
            )
            raise NotImplementedError(msg)
        place = torch.arange(pattern.q_length, device=pattern.q_offset.device)
        visible = torch.clamp(place + pattern.shift + 1, min=0, max=pattern.kv_length)
        visible = visible if pattern.causal else None
    if isinstance(method, Window):
        sizes = [x for x in (own, pattern.left) if x is not None]
        right = method.right if method.right is not None else method.left
        rights = [x for x in (right if own is not None else None, pattern.right) if x is not None]
        changed = {"left": min(sizes), "right": None if pattern.causal else min(rights)}
        crosses = not pattern.causal and pattern.q_length != pattern.kv_length
        if crosses and pattern.cuts(changed["left"], changed["right"]):
            msg = (
                f"a window of {changed['left']} keys before a query, and {pattern.q_length} queries of one sequence "
                f"see {pattern.kv_length} keys of another; run this layer by 'exact', with "
                f"subquad_torch.transformers.apply"
            )
            raise NotImplementedError(msg)
        if {name: getattr(method, name) for name in changed} != changed:
            method = replace(method, **changed)
        pattern = replace(pattern, left=None, right=None)
    elif not isinstance(method, Exact) and pattern.cuts(pattern.left, pattern.right):
        msg = (
            f"{type(method).__name__} has no sliding window, and this layer has one of {pattern.left} tokens before "
            f"its own; run it by 'exact' or 'window', with subquad_torch.transformers.apply"
        )
        raise NotImplementedError(msg)
    return method, pattern, visible


def _visible_keys(method: Method, pattern: MaskPattern, visible: Tensor | None) -> dict[str, Any]:
    """The arguments of `subquad.attention` that say which keys a query sees."""
    arguments: dict[str, Any] = {}
    causal = pattern.causal and visible is None
    if causal and pattern.q_length == 1 and method.causal is not True and pattern.segments is None:
        causal = False  # the last query sees all keys
    if causal and method.causal is not True:
        msg = f"a causal layer: {method.causal}"
        raise NotImplementedError(msg)
    segments, key_mask = pattern.segments, pattern.key_mask
    if causal and key_mask is not None and segments is None and type(method).__name__ in COUNTED:
        segments = _padding_as_documents(key_mask, pattern.q_length)
    if key_mask is not None:
        arguments["key_mask"] = key_mask[:, None]
    if segments is not None:
        arguments["segments"] = tuple(x[:, None] for x in segments)
    if visible is not None:
        arguments["visible"] = visible
    return arguments | ({"causal": True} if causal else {})


def _padding_as_documents(key_mask: Tensor, n: int) -> tuple[Tensor, Tensor] | None:
    """Padding before and after a sequence as documents of their own, so that blocks are counted from its first token.

    None if tokens in the middle are masked.
    """
    begun = torch.cumsum(key_mask.int(), -1) > 0
    numbers = torch.where(key_mask, 1, torch.where(begun, 2, 0))
    if not torch.compiler.is_compiling() and bool((numbers[:, 1:] < numbers[:, :-1]).any()):
        return None
    return numbers[:, numbers.shape[-1] - n :], numbers


def _with_sinks(method: Method, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The output with one more logit for each head in the denominator."""
    if sinks.ndim != 1:
        msg = f"sinks of shape {tuple(sinks.shape)}, which are not one logit for each head; use 'eager' for this model"
        raise NotImplementedError(msg)
    if "sinks" in method.restrictions:
        return method(q, k, v, sinks=sinks, **arguments)
    if "return_lse" not in method.restrictions:
        msg = f"{type(method).__name__} cannot take sinks (s_aux); 'exact', 'window' and 'clustered' take them"
        raise NotImplementedError(msg)
    out, lse = method(q, k, v, return_lse=True, **arguments)
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])  # of the keys in the sum with the sink
    return (out * share[..., None]).to(out.dtype)
