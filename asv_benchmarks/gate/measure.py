"""How much slower: both trees in turn, a statistic that a noisy machine cannot raise, and a second look."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from asv_benchmarks.gate.trees import Worker, workers

SAMPLE_SECONDS = 5e-3  # a sample is as many calls as last that long
CASE_SECONDS = 1.2  # both trees together
LEAST, MOST = 7, 150  # pairs
SECOND_LOOK = 2  # times the pairs


@dataclass(frozen=True)
class Slowdown:
    """How many times slower the second of two is, by two measures; the samples were taken in pairs.

    What slows the code down raises both the ratio of the minima and the median ratio of a pair. A neighbour who takes
    the processor for a while raises at most one, as long as he leaves alone either half of the pairs or one sample.
    """

    of_minima: float
    median: float

    @classmethod
    def of(cls, base: Sequence[float], tree: Sequence[float]) -> Slowdown:
        median = statistics.median(t / b for b, t in zip(base, tree, strict=True))
        return cls(min(tree) / min(base), median)

    @property
    def least(self) -> float:
        """What both agree on."""
        return min(self.of_minima, self.median)

    @property
    def most(self) -> float:
        """What either fears."""
        return max(self.of_minima, self.median)


@dataclass(frozen=True)
class Finding:
    """A case: seconds in the two trees and how many times slower, or why there is no such number."""

    case: str
    base: float | None = None
    tree: float | None = None
    slowdown: Slowdown | None = None
    base_failure: str | None = None  # new in the working tree, or broken in the base
    tree_failure: str | None = None

    def is_alarm(self, factor: float) -> bool:
        return self.tree_failure is not None or (self.slowdown is not None and self.slowdown.least > factor)

    def is_suspicious(self, factor: float) -> bool:
        return self.slowdown is not None and self.slowdown.most > factor


def compare(base: Path, tree: Path, cases: Iterable[str], factor: float, *, injected: int = 1) -> list[Finding]:
    """Measure the cases; what may be slower once more, with more pairs and in fresh processes, and that look decides.

    `injected` makes the working tree that many times slower: it is called so often for one call of the base.
    """
    findings = _measure(base, tree, cases, injected, 1)
    suspicious = [case for case, finding in findings.items() if finding.is_suspicious(factor)]
    if suspicious:  # where a process happens to lie in memory lasts as long as it does: hence fresh ones
        findings |= _measure(base, tree, suspicious, injected, SECOND_LOOK)
    return list(findings.values())


def _measure(base: Path, tree: Path, cases: Iterable[str], injected: int, times: int) -> dict[str, Finding]:
    with workers(base, tree) as (one, other):
        return {case: _measure_case(case, one, other, injected, times) for case in cases}


def _measure_case(case: str, base: Worker, tree: Worker, injected: int, times: int) -> Finding:
    for worker in (base, tree):  # both compile at once
        worker.ask("prepare", case)
    of_base, of_tree = base.answer(), tree.answer()
    if "failure" in of_base or "failure" in of_tree:
        return Finding(case, base_failure=of_base.get("failure"), tree_failure=of_tree.get("failure"))
    slower = max(of_base["seconds"], of_tree["seconds"])
    calls = max(1, round(SAMPLE_SECONDS / slower))
    pairs = times * min(MOST, max(LEAST, math.ceil(CASE_SECONDS / (2 * calls * slower))))
    base_samples: list[float] = []
    tree_samples: list[float] = []
    for i in range(pairs):
        for worker in (base, tree) if i % 2 else (tree, base):  # neither always comes first
            worker.ask("run", case, calls * injected if worker is tree else calls)
            answer = worker.answer()
            if "failure" in answer:
                return Finding(case, **{f"{'tree' if worker is tree else 'base'}_failure": answer["failure"]})
            if worker is tree:
                tree_samples.append(answer["seconds"] * injected)
            else:
                base_samples.append(answer["seconds"])
    return Finding(case, min(base_samples), min(tree_samples), Slowdown.of(base_samples, tree_samples))
