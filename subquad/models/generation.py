"""Text token by token: a prompt goes through the model at once, then each token that is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from subquad.core.host import floats_of
from subquad.models.sampling import Sampler
from subquad.models.source import Host
from subquad.models.tokens import TextStream
from subquad.random import generator

PREFILL = 2048  # tokens of a prompt that go through the model together, so that memory does not grow with its length

Forward = Callable[[Host, Host | None, Any], tuple[Any, Any]]
"""(tokens (batch, n), mask, state) → (logits of the last token (batch, vocab_size), state)."""


@dataclass(frozen=True)
class Stops:
    """What ends a text: a token, or a string that its text holds."""

    tokens: frozenset[int]
    strings: tuple[str, ...]


def stops_of(stop: Any, eos: tuple[int, ...], tokenizer: Any) -> Stops:
    """What an argument `stop` says: numbers in place of `eos`, strings beside them; TypeError for anything else."""
    given = [] if stop is None else [stop] if isinstance(stop, str | int | np.integer) else stop
    if not isinstance(given, list | tuple | set | frozenset) or not all(  # bytes would be taken for token numbers
        isinstance(x, str | int | np.integer) and not isinstance(x, bool) for x in given
    ):
        msg = f"stop is {stop!r}, expected a token number, a string, or a list of these"
        raise TypeError(msg)
    strings = tuple(x for x in given if isinstance(x, str))
    tokens = frozenset(int(x) for x in given if not isinstance(x, str))
    if "" in strings:
        msg = "stop holds an empty string, which every text holds"
        raise ValueError(msg)
    if strings and tokenizer is None:
        msg = f"stop holds the string {strings[0]!r}, but the model has no tokenizer; give token numbers"
        raise ValueError(msg)
    return Stops(tokens if tokens or (stop is not None and not strings) else frozenset(eos), strings)


@dataclass
class Row:
    """One text of a batch: what was generated, and whether it has ended."""

    stops: Stops
    rng: np.random.Generator
    text: TextStream | None
    ended: bool = False
    tail: str = ""
    pieces: list[str] = field(default_factory=list)

    def add(self, token: int) -> None:
        """Take a new token, and see whether it ends the text."""
        self.ended = token in self.stops.tokens
        if self.text is None:
            return
        piece = self.text.add(token)
        self.pieces.append(piece)
        self.tail += piece
        self.ended = self.ended or any(stop in self.tail for stop in self.stops.strings)
        longest = max(map(len, self.stops.strings), default=1)
        self.tail = self.tail[max(0, len(self.tail) - longest + 1) :]  # where a stop may have begun


def rows_of(prompts: list[list[int]], stops: Stops, seed: int, tokenizer: Any, *, text: bool) -> list[Row]:
    """The rows of a batch; each draws by (seed, its number), so that it does not depend on the others."""
    wanted = text or bool(stops.strings)
    return [
        Row(stops, generator(seed, i), TextStream(tokenizer, prompt) if wanted else None)
        for i, prompt in enumerate(prompts)
    ]


def decode(
    forward: Forward, tokens: Host, mask: Host | None, state: Any, rows: list[Row], sampler: Sampler, max_new: int
) -> Iterator[list[int | None]]:
    """The new tokens of all rows, step by step; None for a row that has ended."""
    for start in range(0, tokens.shape[1] - PREFILL, PREFILL):
        part = slice(start, start + PREFILL)
        _, state = forward(tokens[:, part], None if mask is None else mask[:, part], state)
    rest = slice((tokens.shape[1] - 1) // PREFILL * PREFILL, None)
    tokens, mask = tokens[:, rest], None if mask is None else mask[:, rest]
    for step in range(max_new):
        logits, state = forward(tokens, mask, state)
        host, mask = floats_of(logits), None
        chosen: list[int | None] = []
        for row, numbers in zip(rows, host, strict=True):
            chosen.append(None if row.ended else sampler.choose(numbers, row.rng))
        for row, token in zip(rows, chosen, strict=True):
            if token is not None:
                row.add(token)
        yield chosen
        if step + 1 == max_new or all(row.ended for row in rows):
            return
        tokens = np.asarray([[0 if x is None else x] for x in chosen], np.int32)
