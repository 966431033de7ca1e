"""Tokens: prompts in any form as lists of numbers, text by a tokenizer, and arrays for a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from subquad.core.host import to_host
from subquad.models.source import needed


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a directory's tokenizer.json; None if there is no such file, or no package to read it with."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizers = needed("tokenizers", "text")
    except ModuleNotFoundError:
        return None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain exceptions
        msg = f"{path} is no tokenizer: {error}"
        raise ValueError(msg) from None


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text; ValueError without a tokenizer."""
    if tokenizer is None:
        msg = (
            "the model has no tokenizer, so that a prompt must be a list of token numbers: text needs a "
            'tokenizer.json beside the weights, and the package tokenizers (pip install "subquad[models]")'
        )
        raise ValueError(msg)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a pair of UTF-16, or a byte that is no character
        msg = f"the text holds {text[error.start]!r} at {error.start}, which is no character; decode it as what it is"
        raise ValueError(msg) from None
    return [int(x) for x in tokenizer.encode(text).ids]


def prompts_of(tokens: Any, tokenizer: Any) -> tuple[list[list[int]], bool, bool]:
    """(prompts as lists of numbers, whether there is one alone, whether it was text), of anything that is a prompt.

    TypeError for what is none, ValueError for an empty prompt.
    """
    if isinstance(tokens, str):
        prompts, alone, text = [encode(tokenizer, tokens)], True, True
    elif isinstance(tokens, list | tuple) and tokens and all(isinstance(x, str) for x in tokens):
        prompts, alone, text = [encode(tokenizer, x) for x in tokens], False, True
    else:
        prompts, alone, text = *_numbers(tokens), False
    for i, prompt in enumerate(prompts):
        if not prompt:
            which = "the prompt" if alone else f"prompt {i}"
            msg = f"{which} has no tokens, expected at least one, such as the token that begins a text"
            raise ValueError(msg)
    return prompts, alone, text


def _numbers(tokens: Any) -> tuple[list[list[int]], bool]:
    if hasattr(tokens, "ndim"):
        host = to_host(tokens)
        if host.ndim not in (1, 2) or host.dtype.kind not in "iu":
            msg = f"tokens has shape {host.shape} and dtype {host.dtype}, expected integers of shape (n,) or (batch, n)"
            raise TypeError(msg)
        tokens = host.tolist()
    if not isinstance(tokens, list | tuple):
        msg = f"tokens is a {type(tokens).__name__}, expected text, token numbers, or a list of prompts"
        raise TypeError(msg)
    alone = not tokens or not any(isinstance(x, list | tuple) or (hasattr(x, "ndim") and x.ndim) for x in tokens)
    rows = [tokens] if alone else tokens
    return [_row(row) for row in rows], alone


def _row(row: Any) -> list[int]:
    row = to_host(row).tolist() if hasattr(row, "ndim") else row
    if not isinstance(row, Sequence) or not all(
        isinstance(x, int | np.integer) and not isinstance(x, bool) for x in row
    ):
        msg = f"a prompt is {row!r:.60}, expected a list of token numbers; prompts are all text or all numbers"
        raise TypeError(msg)
    return [int(x) for x in row]


def padded(prompts: list[list[int]]) -> tuple[Any, Any]:
    """(tokens (batch, n), mask (batch, n) or None) of prompts, padded on the left to the longest."""
    n = max(map(len, prompts))
    tokens, mask = np.zeros((len(prompts), n), np.int32), np.zeros((len(prompts), n), np.bool_)
    for i, prompt in enumerate(prompts):
        tokens[i, n - len(prompt) :] = prompt
        mask[i, n - len(prompt) :] = True
    return tokens, None if mask.all() else mask


class TextStream:
    """The text of tokens that come one by one: each piece as soon as its characters are whole."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.stream = needed("tokenizers.decoders", "text").DecodeStream(skip_special_tokens=True)
        for token in prompt:  # so that a first piece keeps the space that it begins with
            self.add(token)

    def add(self, token: int) -> str:
        """The text that a token adds, "" while a character is not complete."""
        return self.stream.step(self.tokenizer, token) or ""
