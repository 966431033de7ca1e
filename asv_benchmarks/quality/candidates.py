"""The methods to judge: what `subquad compare --methods` takes, and windows that keep their first keys."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

import subquad
from asv_benchmarks.quality.shares import SHARES
from subquad import registry
from subquad.cli.cases import Attention, parse, reason_against_causal
from subquad.cli.errors import CommandError

WINDOWS = ("window:left=252:sinks=4", "window:left=508:sinks=4", "window:left=1020:sinks=4")
SINKS = re.compile(r"^((?:window|longformer)\b.*?):sinks=(\d+)(.*)$")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method with its options, causal or not. `sinks` is how many first keys a window keeps in every row's sight."""

    case: Attention
    sinks: int = 0

    @property
    def label(self) -> str:
        """Name in tables, e.g. "window 508 + 4 first"."""
        return f"{self.case.label} + {self.sinks} first" if self.sinks else self.case.label

    def method(self, n: int) -> Any:
        """The method for n tokens."""
        seed = {} if self.case.seed is None else {"seed": self.case.seed}
        mask = {"global_mask": torch.arange(n) < self.sinks} if self.sinks else {}
        return registry.make_method(self.case.name, {**self.case.options, **seed, **mask})


def find(text: str | None, *, causal: bool, seed: int = 0) -> tuple[list[Candidate], list[str]]:
    """(candidates of `--methods`, notes on those left out because they have no causal form).

    None means every method of the registry but exact attention, as `subquad compare` runs them, and in causal use
    three windows that keep their first four keys.
    """
    wanted = [] if text is not None else _defaults(causal=causal, seed=seed)
    items = text.split(",") if text is not None else WINDOWS if causal else ()
    wanted += [_candidate(item.strip(), causal=causal, seed=seed) for item in items]
    found: list[Candidate] = []
    left_out = []
    for candidate in wanted:
        if causal and (reason := reason_against_causal(candidate.case)):
            left_out.append(f"{candidate.label} left out: {reason}")
        elif candidate not in found:
            found.append(candidate)
    return found, left_out


def _defaults(*, causal: bool, seed: int) -> list[Candidate]:
    cases, _ = parse(None, causal=False, seed=seed)
    methods = [x for x in cases if isinstance(x, Attention) and x.name != "exact"]
    return [Candidate(dataclasses.replace(x, causal=causal)) for x in methods]


def _candidate(item: str, *, causal: bool, seed: int) -> Candidate:
    """The candidate of one item, "method:option=value…"."""
    matched = SINKS.match(item)
    (case,), _ = parse(matched[1] + matched[3] if matched else item, causal=False, seed=seed)
    if not isinstance(case, Attention):
        msg = f"--methods {item!r}: a scan is no attention method; there are {', '.join(registry.METHODS)}"
        raise CommandError(msg)
    return Candidate(dataclasses.replace(case, causal=causal), int(matched[2]) if matched else 0)


class Replacement:
    """Attention of all layers of a model by one candidate, to be passed as `attend`; it collects the shares of keys."""

    def __init__(self, candidate: Candidate, n: int) -> None:
        self.method, self.causal = candidate.method(n), candidate.case.causal
        self._share = SHARES.get(candidate.case.name)
        self._shares: list[float] = []

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        if self._share is not None:
            self._shares.append(self._share(self.method, q, k, v, causal=self.causal))
        return subquad.attention(q, k, v, self.method, causal=self.causal)

    @property
    def share(self) -> float | None:
        """Keys read per row over visible keys, averaged over layers; None if the method has no such number."""
        return sum(self._shares) / len(self._shares) if self._shares else None
