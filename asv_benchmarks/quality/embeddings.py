"""MiniLM with the attention of all layers replaced: are embeddings still right, and do they find the same passages?"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import subquad
from asv_benchmarks.quality import minilm, texts
from asv_benchmarks.quality.candidates import Candidate, Replacement
from asv_benchmarks.quality.table import REFERENCE

PASSAGES, NEAREST = 40, 5
JUDGED = 8  # passages whose heads' errors are measured
Record = dict[str, Any]


def measure(candidates: Sequence[Candidate], use: str, now: Callable[[str], None]) -> Iterator[Record]:
    """A row for exact attention, for the mean of v as its output, and for each candidate.

    `now` is called with what is computed next.
    """
    model, about = minilm.MiniLM(), {"model": "minilm", "text": "prose", "n": minilm.CONTEXT}
    tokens = model.chunks(texts.read("prose", use), PASSAGES)
    now("MiniLM, exact")
    recorder = Recorder()
    exact = model.embed(tokens, recorder)
    yield {**about, "method": REFERENCE, "share": 1.0, **compare(exact, exact), "between": between(exact)}
    mean = model.embed(tokens, mean_of_values)
    errors = recorder.errors(lambda q, k, v: mean_of_values(q, k, v, 0))
    yield {**about, "method": "mean of v", "share": None, **compare(mean, exact), **errors}
    for candidate in candidates:
        now(f"MiniLM, {candidate.label}")
        yield {**about, "method": candidate.label, **_row(model, tokens, candidate, exact, recorder)}


def _row(
    model: minilm.MiniLM, tokens: torch.Tensor, candidate: Candidate, exact: torch.Tensor, recorder: Recorder
) -> Record:
    replacement = Replacement(candidate, tokens.shape[1])
    try:
        found = model.embed(tokens, replacement)
        errors = recorder.errors(lambda q, k, v: subquad.attention(q, k, v, replacement.method))
    except (ValueError, TypeError, NotImplementedError, MemoryError) as error:
        return {"failure": f"{type(error).__name__}: {error}"}
    if not bool(torch.isfinite(found).all()):
        return {"failure": "an embedding is not finite"}
    return {"share": replacement.share, **compare(found, exact), **errors}


def mean_of_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
    """The mean of v for every query: attention that reads neither q nor k."""
    return v.mean(dim=-2, keepdim=True).expand_as(v)


def compare(found: torch.Tensor, exact: torch.Tensor) -> Record:
    """Cosines to the exact embeddings, and the part of the exact nearest passages that is found (of other passages)."""
    cosines = (found * exact).sum(-1)
    pairs = zip(nearest(found), nearest(exact), strict=True)
    overlap = statistics.mean(len(set(a) & set(b)) / NEAREST for a, b in pairs)
    return {"cosine": cosines.mean().item(), "least_cosine": cosines.min().item(), "overlap": overlap}


def nearest(embeddings: torch.Tensor) -> list[list[int]]:
    """For each passage the NEAREST others by cosine."""
    cosines = embeddings @ embeddings.mT
    return cosines.fill_diagonal_(-2.0).topk(NEAREST).indices.tolist()


def between(embeddings: torch.Tensor) -> float:
    """The mean cosine of different passages."""
    cosines, count = embeddings @ embeddings.mT, len(embeddings)
    return ((cosines.sum() - count) / (count * (count - 1))).item()


@dataclasses.dataclass
class Recorder:
    """Exact attention that keeps the arrays of the first JUDGED passages and its output for them, layer by layer."""

    layers: list[tuple[torch.Tensor, ...]] = dataclasses.field(default_factory=list)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        out = minilm.exact(q, k, v, layer)
        self.layers.append(tuple(x[:JUDGED] for x in (q, k, v, out)))
        return out

    def errors(self, attend: Callable[..., torch.Tensor]) -> Record:
        """Median and largest of the relative errors ‖out − exact‖ / ‖exact‖ of the heads of all layers."""
        found = []
        for q, k, v, exact in self.layers:
            off = torch.linalg.vector_norm(attend(q, k, v) - exact, dim=(0, 2, 3))
            found += (off / torch.linalg.vector_norm(exact, dim=(0, 2, 3))).tolist()
        return {"error": statistics.median(found), "largest_error": max(found)}
