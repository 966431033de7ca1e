"""The attention functions that transformers calls: attention of a layer by a method of subquad, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import output_capturing

from subquad_torch.transformers.evaluate import evaluate
from subquad_torch.transformers.options import choice, make
from subquad_torch.transformers.visible_keys import pattern_of_call

# what changes the output, and no method has
UNKNOWN = ("head_mask", "indices", "block_indices")


def attention_function(implementation: str) -> Callable[..., tuple[Tensor, None]]:
    """The function that `AttentionInterface` holds under this name."""

    def subquad_attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        try:
            method, options = choice(module, implementation)
            _check(module, dropout, others)
            pattern = pattern_of_call(
                module, query, key, attention_mask, is_causal=is_causal, sliding_window=sliding_window,
                cu_seq_lens=(cu_seq_lens_q, cu_seq_lens_k), position_ids=others.get("position_ids"),
            )  # fmt: skip
            sinks = others.get("sinks") if s_aux is None else s_aux
            out = evaluate(
                make(method, options), options, query, key, value, pattern, scale=scaling, softcap=softcap, sinks=sinks,
                bias=position_bias,
            )  # fmt: skip
        except (NotImplementedError, ValueError) as error:
            if torch.compiler.is_compiling():  # a program cannot rewrite errors
                raise
            msg = f"{implementation} in {_place(module)}: {error}"
            raise type(error)(msg) from error
        return out.transpose(1, 2).contiguous(), None

    subquad_attention.__name__ = f"{implementation.replace('-', '_')}_attention"
    return subquad_attention


def _check(module: Any, dropout: float, others: dict[str, Any]) -> None:
    """NotImplementedError for what the call asks for and no method can do."""
    if dropout and module.training:
        msg = (
            f"dropout={dropout} of attention weights in training: subquad has no matrix of weights to drop from; set "
            f"the config's attention dropout ('attention_dropout', 'attention_probs_dropout_prob', …) to 0"
        )
        raise NotImplementedError(msg)
    if others.get("output_attentions") or _weights_are_collected():
        msg = (
            "output_attentions=True: the weights are never a matrix; use attn_implementation='eager', or "
            "subquad.attention_weights on the queries and keys of a layer"
        )
        raise NotImplementedError(msg)
    for name in UNKNOWN:
        if others.get(name) is not None:
            msg = f"{name} is an argument that subquad's attention does not take; use attn_implementation='eager'"
            raise NotImplementedError(msg)


def _weights_are_collected() -> bool:
    """Whether the model collects weights by hooks: GPT-2, OPT, … do not tell their attention functions about it."""
    collected = output_capturing._active_collector.get()
    return collected is not None and any(key.endswith("attentions") for key in collected)


def _place(module: Any) -> str:
    layer = getattr(module, "layer_idx", None)
    return f"{type(module).__name__}{'' if layer is None else f' of layer {layer}'}"
