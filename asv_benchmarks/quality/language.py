"""SmolLM2 with the attention of all layers replaced: how much worse it predicts the second half of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from asv_benchmarks.quality import smollm2, texts
from asv_benchmarks.quality.candidates import Candidate, Replacement
from asv_benchmarks.quality.table import REFERENCE

Record = dict[str, Any]


def measure(
    candidates: Sequence[Candidate], lengths: Sequence[int], use: str, now: Callable[[str], None]
) -> Iterator[Record]:
    """A row for exact attention and for each candidate, on prose and code, at each length.

    `now` is called with what is computed next.
    """
    model = smollm2.SmolLM2()
    for kind in texts.KINDS:
        tokens = model.encode(texts.read(kind, use), max(lengths))
        now(f"SmolLM2, {kind}, exact")
        reference = model.losses(tokens, smollm2.exact)  # of every length: no loss depends on later tokens
        for n in lengths:
            exact = second_half(reference[: n - 1])
            about = {"model": "smollm2", "text": kind, "n": n}
            yield {**about, "method": REFERENCE, "share": 1.0, **compare(exact, exact)}
            for candidate in candidates:
                now(f"SmolLM2, {kind}, n = {n}, {candidate.label}")
                yield {**about, "method": candidate.label, **_row(model, tokens[:n], candidate, exact)}


def _row(model: smollm2.SmolLM2, tokens: torch.Tensor, candidate: Candidate, exact: torch.Tensor) -> Record:
    replacement = Replacement(candidate, len(tokens))
    try:
        losses = model.losses(tokens, replacement)
    except (ValueError, TypeError, NotImplementedError, MemoryError) as error:
        return {"failure": f"{type(error).__name__}: {error}"}
    if not bool(torch.isfinite(losses).all()):
        return {"failure": "a loss is not finite"}
    return {"share": replacement.share, **compare(second_half(losses), exact)}


def second_half(losses: torch.Tensor) -> torch.Tensor:
    """The losses of the tokens n/2 … n − 1, of those of the tokens 1 … n − 1."""
    return losses[(len(losses) + 1) // 2 - 1 :]


def compare(losses: torch.Tensor, exact: torch.Tensor) -> Record:
    """Perplexity, and the mean and the mean size of the difference to the exact losses, in nats per token."""
    losses, exact = losses.double(), exact.double()
    off = losses - exact
    return {"perplexity": losses.mean().exp().item(), "delta": off.mean().item(), "size": off.abs().mean().item()}
