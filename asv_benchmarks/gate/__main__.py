"""`python -m asv_benchmarks.gate`: fail if the working tree is slower than a base commit.

Both trees are measured in one run, in turn, each in a process of its own; a case that looks slower is measured once
more before it alarms. Ends with 1 if a case is slower by more than the factor, or fails in the working tree alone.
"""

from __future__ import annotations

import argparse
import re
import sys

from rich.console import Console
from rich.table import Table

import asv_benchmarks.benchmarks  # noqa: F401  sets the threads of every pool, which the workers inherit
from asv_benchmarks.gate.cases import CASES
from asv_benchmarks.gate.measure import Finding, compare
from asv_benchmarks.gate.trees import ROOT, NoBaseError, checked_out, find_commit, is_history_cut

INJECTED = 2  # times slower, in half of the trials
console = Console(width=110)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.gate", description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="HEAD", help="commit to compare the working tree with (default HEAD)")
    parser.add_argument("--factor", type=float, default=1.5, help="how many times slower is too slow (default 1.5)")
    parser.add_argument("--bench", action="append", metavar="REGEX", help=f"cases to run, of: {', '.join(CASES)}")
    trials = f"judge the gate itself: N runs as it is, N with the working tree made {INJECTED} times slower"
    parser.add_argument("--trials", type=int, metavar="N", help=trials)
    args = parser.parse_args()
    cases = [case for case in CASES if not args.bench or any(re.search(x, case) for x in args.bench)]
    if not cases or args.factor <= 1:
        parser.error("--factor must be greater than 1" if cases else f"no case matches; there are {', '.join(CASES)}")
    try:
        commit = find_commit(args.base)
    except NoBaseError as error:
        if args.base.startswith("HEAD") and is_history_cut():
            console.print(f"{error}: the history is cut off. Nothing to compare with.")
            return 0
        parser.error(str(error))
    if args.trials:
        return judge(commit, cases, args.factor, args.trials)
    findings = run(commit, cases, args.factor)
    console.print(table(findings, args.factor, f"working tree against {args.base} ({commit[:8]})"))
    return int(any(finding.is_alarm(args.factor) for finding in findings))


def run(commit: str, cases: list[str], factor: float, injected: int = 1) -> list[Finding]:
    with checked_out(commit) as base:
        return compare(base, ROOT, cases, factor, injected=injected)


def table(findings: list[Finding], factor: float, title: str) -> Table:
    out = Table("case", "base / ms", "tree / ms", "times slower", "", title=title)
    for x in findings:
        if x.slowdown is None or x.base is None or x.tree is None:
            tree_fails = x.tree_failure and f"fails in the working tree: {x.tree_failure}"
            out.add_row(x.case, "–", "–", "–", tree_fails or f"new: in the base, {x.base_failure}")
            continue
        verdict = f"slower than {factor:g}×" if x.is_alarm(factor) else "ok"
        style = "bold red" if x.is_alarm(factor) else None
        cells = f"{1e3 * x.base:.3f}", f"{1e3 * x.tree:.3f}", f"{x.slowdown.least:.2f}"
        out.add_row(x.case, *cells, verdict, style=style)
    return out


def judge(commit: str, cases: list[str], factor: float, trials: int) -> int:
    """How often the gate alarms where nothing has changed, and where everything became slower."""
    out = Table("trial", "alarms", "times slower: least", "most", title=f"factor {factor:g}, {len(cases)} cases")
    wrong = 0
    for injected in (1, INJECTED):
        alarms = 0
        for i in range(trials):
            findings = run(commit, cases, factor, injected)
            alarmed = [x.case for x in findings if x.is_alarm(factor)]
            alarms += bool(alarmed)
            ratios = [x.slowdown.least for x in findings if x.slowdown]
            spread = [f"{f(ratios):.2f}" for f in (min, max)] if ratios else ["–", "–"]
            name = f"{'unchanged' if injected == 1 else f'{injected}× slower'}, {i + 1}"
            out.add_row(name, f"{len(alarmed)} of {len(cases)} cases", *spread)
            console.print(f"{name}: {', '.join(alarmed) or 'no alarm'}; times slower {' to '.join(spread)}")
        wrong += alarms if injected == 1 else trials - alarms
        out.add_section()
        console.print(f"{alarms} of {trials} runs alarmed")
    console.print(out)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
