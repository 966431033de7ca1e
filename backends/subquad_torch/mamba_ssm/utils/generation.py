"""Generation of tokens with an inference cache, as ``mamba_ssm.utils.generation`` has it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from subquad_torch.mamba_ssm.utils.sampling import (
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)

__all__ = [
    "GenerateDecoderOnlyOutput",
    "GenerationMixin",
    "InferenceParams",
    "decode",
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
]

LOGGER = logging.getLogger("subquad_torch.mamba_ssm")
_told: set[str] = set()


@dataclass
class InferenceParams:
    """What a model needs to continue sequences: their states, and how many tokens there were.

    Parameters
    ----------
    max_seqlen, max_batch_size : int
        Greatest length and batch.
    seqlen_offset : int
        Tokens so far; 0 where the sequences begin.
    batch_size_offset : int
        Kept for layers of attention, which use it.
    key_value_memory_dict : dict
        The states of each layer, by its number.
    lengths_per_sample : Tensor, optional
        Kept for layers of attention, which use it.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin anew with sequences of other sizes."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class GenerateDecoderOnlyOutput:
    """Tokens (batch, length) with the prompt, and for each new token the logits (batch, vocab_size), if asked for."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> GenerateDecoderOnlyOutput:
    """Continue prompts of one length, token by token.

    Parameters
    ----------
    input_ids : Tensor of int, shape (batch, seqlen)
        The prompts.
    model : callable
        Gives ``.logits`` for tokens, ``position_ids``, ``inference_params`` and ``num_last_tokens``.
    max_length : int
        Length with the prompt; more than that of the prompt.
    top_k, top_p, min_p, temperature : optional
        As in `sample`; with `top_k` 1, the most probable token.
    repetition_penalty : float, default 1.0
        Logits of tokens that were there are divided by it, or multiplied where they are negative.
    eos_token_id : int, optional
        End where all sequences give this token at one step.
    teacher_outputs : Tensor of int, shape (batch, length), optional
        Tokens that are taken in place of sampled ones, as far as they go.
    vocab_size : int, optional
        Logits beyond it do not count.
    cg : bool, default False
        The original captures a CUDA graph, which changes no number. Here none is captured, which is logged once.
    enable_timing : bool, default False
        Print how long it took.
    output_scores : bool, default False
        Keep the logits.
    streamer : object, optional
        Gets the prompt and each token by ``put``, and ``end``, as those of transformers.

    Returns
    -------
    GenerateDecoderOnlyOutput
        The sequences, and the logits.

    Raises
    ------
    ValueError
        If `max_length` leaves no room for a new token, or a parameter of sampling is out of range.
    """
    batch_size, prompt = input_ids.shape
    if max_length <= prompt:
        msg = f"max_length is {max_length}, expected more than the {prompt} tokens of input_ids, which it counts"
        raise ValueError(msg)
    if cg and "cg" not in _told:
        _told.add("cg")
        LOGGER.warning("cg=True: no CUDA graph is captured; the tokens are those of cg=False")
    if streamer is not None:
        streamer.put(input_ids.cpu())
    params = InferenceParams(max_seqlen=max_length, max_batch_size=batch_size)
    began, scores, tokens, so_far = time.perf_counter(), [], input_ids, input_ids
    while so_far.shape[1] < max_length:
        position_ids = None
        if params.seqlen_offset:
            position_ids = torch.full((batch_size, 1), params.seqlen_offset, dtype=torch.long, device=input_ids.device)
        logits = model(tokens, position_ids=position_ids, inference_params=params, num_last_tokens=1).logits[:, -1]
        logits = logits if vocab_size is None else logits[..., :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        params.seqlen_offset += tokens.shape[1]
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            tokens = teacher_outputs[:, params.seqlen_offset, None]
        else:
            if repetition_penalty != 1.0:
                logits = modify_logit_for_repetition_penalty(logits.clone(), so_far, repetition_penalty)
            tokens = sample(logits, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)[:, None]
        so_far = torch.cat([so_far, tokens], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if eos_token_id is not None and bool((tokens == eos_token_id).all()):
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize(input_ids.device)
        print(f"Prompt processing and decoding took {(time.perf_counter() - began) * 1000:.0f} ms")
    return GenerateDecoderOnlyOutput(so_far, tuple(scores))


class GenerationMixin:
    """Adds `generate` to a model with `allocate_inference_cache`."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any) -> Any:
        """The states of all layers, which a model defines."""
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts (batch, seqlen) to `max_length` tokens.

        Parameters
        ----------
        input_ids, max_length, top_k, top_p, min_p, temperature, output_scores, **kwargs : optional
            As in `decode`.
        return_dict_in_generate : bool, default False
            Return sequences and scores in place of the sequences.

        Returns
        -------
        Tensor of int, shape (batch, length), or GenerateDecoderOnlyOutput
            The sequences, prompts included.
        """
        output = decode(
            input_ids, self, max_length, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature,
            output_scores=output_scores, **kwargs,
        )  # fmt: skip
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences
