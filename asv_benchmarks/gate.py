"""`python -m asv_benchmarks.gate`: fail if the working tree is slower than a base commit.

Every registered operator of the working tree is a case, on NumPy with one thread. The two trees run a case in turn,
each in its own process; a case that looks slower is measured again. The exit code is 1 if a case is slower by more than
the factor, or fails in the working tree alone. A case that the base cannot run counts as new.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from asv_benchmarks import environment, harness
from asv_benchmarks.tree import Question, check_out, process
from subquad.cli.cases import is_quadratic

SAMPLE_SECONDS, CASE_SECONDS = 5e-3, 1.2  # seconds of one sample (calls in a row); of a case, both trees together
LEAST, MOST = 7, 150  # min and max number of pairs of samples
SHORT = (
    "exact",
    "favor",
    "linear",
    "nystrom",
)  # methods that are measured on 64 rows too, where a call is all overhead
INJECTED = 2  # factor by which half of the trials slow the working tree down


class Finding(NamedTuple):
    """The result of a case: times of samples, taken in pairs, or failures; both by "base" and "tree"."""

    case: str
    times: Mapping[str, list[float]]
    failures: Mapping[str, str]

    @property
    def slower(self) -> tuple[float, float]:
        """(ratio tree / base of the minima, median ratio of the pairs); infinite if the working tree alone fails.

        Slower code raises both ratios. Another process that takes the processor for a while raises one of them at most,
        as long as it leaves half of the pairs, or one sample, undisturbed.
        """
        if self.failures:
            return (0.0 if "base" in self.failures else math.inf,) * 2
        base, tree = self.times["base"], self.times["tree"]
        return min(tree) / min(base), statistics.median(t / b for b, t in zip(base, tree, strict=True))


def cases() -> dict[str, Question]:
    """Case → arguments of `tree.prepare`, for every operator and every step in the registry; a call takes ms."""
    found: dict[str, Question] = {}
    for name in harness.operators():
        case = harness.case(name)
        problem = case.random(1024 if is_quadratic(case) or name.endswith("causal") else 4096)
        found[name] = _question(problem)
        if name in harness.registry.SCANS:  # read as it is stored
            half = {key: x.astype("float16") for key, x in problem.arrays.items()}
            found[f"{name} float16"] = _question(dataclasses.replace(problem, arrays=half))
    found |= {f"{name} short": _question(harness.case(name).random(64)) for name in SHORT}
    for name in harness.stepping():
        found[f"{name} step"] = _question(harness.one_step(name))
        if name in harness.registry.METHODS:  # each tree makes the state itself, since its fields may differ
            found[f"{name} step"] = name, dict(harness.case(name).random(1).arrays), 0, None
    return found


def _question(problem: harness.Problem) -> Question:
    return problem.function.__name__, dict(problem.arrays), problem.positional, dict(problem.options)


def measure(case: str, question: Question, trees: Mapping[str, Any], injected: int, look: int) -> Finding:
    """The finding of a case from pairs of samples; `look`, 1 or 2, multiplies the number of pairs."""
    failures: dict[str, str] = {}
    for name, ask in trees.items():
        try:
            ask(question)
        except ChildProcessError as error:
            failures[name] = str(error)
    if failures:
        return Finding(case, {}, failures)
    slower = max(harness.seconds(partial(ask, 1)) for ask in trees.values())
    calls = max(1, round(SAMPLE_SECONDS / slower))
    pairs = look * min(MOST, max(LEAST, math.ceil(CASE_SECONDS / (2 * calls * slower))))
    times = harness.interleave(
        {"base": partial(trees["base"], calls), "tree": partial(trees["tree"], calls * injected)}, pairs
    )
    return Finding(case, {name: [x / calls for x in found] for name, found in times.items()}, {})


def compare(base: Path, tree: Path, wanted: Mapping[str, Question], factor: float, injected: int = 1) -> list[Finding]:
    """Measure the cases, and measure again those that look slower by either ratio; the second look decides.

    The second look starts fresh processes, because an unlucky layout in memory lasts as long as its process. The
    working tree is called `injected` times for one call of the base, which simulates a slowdown by that factor.
    """
    found: dict[str, Finding] = {}
    for look in (1, 2):
        again = [name for name in wanted if look == 1 or math.inf > max(found[name].slower) > factor]
        with process(base, environment("1")) as one, process(tree, environment("1")) as other:
            trees = {"base": one, "tree": other}
            found |= {name: measure(name, wanted[name], trees, injected, look) for name in again}
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.gate", description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="HEAD", help="commit to compare the working tree with (default HEAD)")
    parser.add_argument("--factor", type=float, default=1.5, help="how many times slower is too slow (default 1.5)")
    parser.add_argument("--bench", default="", metavar="REGEX", help=f"cases to run, of: {', '.join(cases())}")
    trials = f"judge the gate itself: N runs as it is, N with the working tree called {INJECTED} times for one call"
    parser.add_argument("--trials", type=int, default=0, metavar="N", help=trials)
    args = parser.parse_args()
    wanted = {name: question for name, question in cases().items() if re.search(args.bench, name)}
    if not wanted or args.factor <= 1:
        parser.error(
            "--factor must be greater than 1" if wanted else f"no case matches; there are {', '.join(cases())}"
        )
    if not harness.git("rev-parse", "--verify", "--quiet", f"{args.base}^{{commit}}"):
        first = harness.git("rev-list", "--count", "HEAD") == "1"
        if args.base.startswith("HEAD") and (first or harness.git("rev-parse", "--is-shallow-repository") == "true"):
            print(f"there is no commit {args.base} here: the history is cut off. Nothing to compare with.")
            return 0
        parser.error(f"there is no commit {args.base} here")
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="subquad-gate-") as folder:
        base = check_out(harness.ROOT, args.base, Path(folder))
        for injected in [1] * max(args.trials, 1) + [INJECTED] * args.trials:
            findings = compare(base, harness.ROOT, wanted, args.factor, injected)
            alarms = [finding for finding in findings if min(finding.slower) > args.factor]
            wrong += bool(alarms) == (injected == 1)
            calls = f" called {injected} times" if injected > 1 else ""
            show(findings, alarms, f"working tree{calls} against {args.base}; an alarm is more than {args.factor:g}×")
    return int(wrong > 0)


def show(findings: list[Finding], alarms: list[Finding], title: str) -> None:
    table = Table("case", "base / ms", "tree / ms", "times slower", "", title=title)
    for finding in findings:
        cells = [f"{1e3 * min(times):.3f}" for times in finding.times.values()] or ["–", "–"]
        told = "; ".join(f"fails in the {side}: {failure}" for side, failure in finding.failures.items())
        told = f"new; {told}" if "base" in finding.failures else told or ("slower" if finding in alarms else "ok")
        style = "bold red" if finding in alarms else None
        table.add_row(finding.case, *cells, f"{min(finding.slower):.2f}", told, style=style)
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main())
