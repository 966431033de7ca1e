"""From logits to a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
]


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Draw a token from each row of logits, by PyTorch's generator.

        p = softmax(logits / temperature)

    among the top_k greatest; of these the least set whose sum is top_p; of these p ≥ min_p max p.

    Parameters
    ----------
    logits : Tensor, shape (batch, vocab_size)
        The logits, which are not written to.
    top_k : int, default 1
        1: the most probable token, whatever the other parameters are. 0: no limit.
    top_p, min_p : float, default 0.0
        0, and 1 for `top_p`: no limit.
    temperature : float, default 1.0
        Above 0.

    Returns
    -------
    Tensor of int, shape (batch,)
        The tokens.

    Raises
    ------
    ValueError
        If a parameter is out of its range.
    """
    for name, given, least in (("top_k", top_k, 0), ("top_p", top_p, 0.0), ("min_p", min_p, 0.0)):
        if given < least or (name != "top_k" and given > 1):
            msg = f"{name} is {given!r}, expected {'0 or more' if name == 'top_k' else 'a number from 0 to 1'}"
            raise ValueError(msg)
    if not temperature > 0 or math.isinf(temperature):
        msg = f"temperature is {temperature!r}, expected a finite number above 0; top_k=1 takes the most probable token"
        raise ValueError(msg)
    if top_k == 1:
        return logits.argmax(dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True) / temperature
    if top_k > 0:
        modify_logits_for_top_k_filtering(logits, min(top_k, logits.shape[-1]))
    modify_logits_for_top_p_filtering(logits, top_p)
    if min_p > 0:
        likely = logits.amax(dim=-1, keepdim=True)
        modify_logits_for_min_p_filtering(logits, likely + math.log(min_p))
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)[:, 0]


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float | Tensor) -> None:
    """Set logits below a threshold to −∞, in place."""
    logits.masked_fill_(logits < min_p, -math.inf)


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set all but the `top_k` greatest logits of each row to −∞, in place."""
    least = logits.topk(top_k, dim=-1).values[..., -1:]
    logits.masked_fill_(logits < least, -math.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Keep the least set of tokens whose probabilities sum to `top_p`; −∞ for the others, in place.

    0 and 1 keep all.
    """
    if not 0 < top_p < 1:
        return
    ordered, places = logits.sort(dim=-1, descending=True)
    p = ordered.softmax(dim=-1)
    surplus = p.cumsum(dim=-1) - p >= top_p  # those before it suffice
    logits.masked_fill_(surplus.scatter(-1, places, surplus), -math.inf)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Make tokens (batch, n) that were there less probable, in place; returns the logits (batch, vocab_size)."""
    if not repetition_penalty > 0:
        msg = f"repetition_penalty is {repetition_penalty!r}, expected a number above 0"
        raise ValueError(msg)
    if repetition_penalty == 1.0:
        return logits
    met = logits.gather(1, prev_output_tokens)
    met = torch.where(met < 0, met * repetition_penalty, met / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, met)
