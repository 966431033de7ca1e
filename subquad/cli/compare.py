"""`subquad compare`: error, time and memory of every method on every array library, side by side."""

import argparse
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from subquad.cli import report
from subquad.cli.cases import Attention, Case, find_case, parse, shown
from subquad.cli.definitions import mean_of_values, relative_error
from subquad.cli.errors import CommandError, missing_for
from subquad.cli.inputs import Inputs, read_npz, read_sample
from subquad.cli.libraries import Target, targets
from subquad.cli.measure import Measurement, measure

MOST_BY_DEFAULT = 4096  # max length by default, since the float64 reference costs n² operations
FAILED = 1
INTERRUPTED = 130  # what shells report for Ctrl-C

ARGUMENTS = {
    "--methods": "comma-separated names, options joined by colons, e.g. exact,favor:num_features=512:seed=3. "
    "Default: {}; with --causal those that can be",
    "--backends": "comma-separated array libraries, with a device if wanted (NAME:DEVICE), as `subquad info` lists "
    "them. Default: all that are usable",
    "--n": "comma-separated numbers of tokens, taken from the start of the arrays. Default: a quarter, a half "
    f"and all of them, at most {MOST_BY_DEFAULT}",
}


class Progress(Protocol):
    """What the measuring loop calls to show its progress."""

    def now(self, what: str) -> None: ...
    def advance(self) -> None: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand to its parser."""
    add = parser.add_argument
    arrays = "q (..., heads, n, d), k (..., key heads, n, d) and v (..., key heads, n, d_v)"
    sample = "Default: real activations that come with the package, 3 heads, n = 1024, d = 64"
    add("file", nargs="?", type=Path, metavar="FILE.npz", help=f"arrays {arrays}. {sample}")
    default = ", ".join(find_case(name, options).label for name, options in shown())
    for name, text in ARGUMENTS.items():
        add(name, metavar="LIST", help=text.format(default))
    add("--causal", action="store_true", help="attend to the past only. Default: to all tokens")
    folder = "folder for compare.json and compare.png, which are overwritten. Default: the current one"
    add("--out", type=Path, default=Path(), metavar="DIR", help=folder)
    add("--seed", type=int, default=0, metavar="INT", help="seed of random methods. Default: %(default)s")
    calls = "timed calls, of which the median counts; 3 are enough once they took half a second. Default: %(default)s"
    add("--repeat", type=int, default=7, metavar="INT", help=calls)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write `compare.json` and `compare.png`; return the exit code."""
    try:
        from subquad.cli import plot, table
    except ModuleNotFoundError as error:
        raise CommandError(missing_for("compare", error)) from error
    for name, least in (("repeat", 1), ("seed", 0)):
        if getattr(args, name) < least:
            msg = f"--{name} is {getattr(args, name)}; expected {least} or more"
            raise CommandError(msg)
    inputs = read_npz(args.file) if args.file else read_sample()
    lengths = _lengths(args.n, inputs)
    chosen, notes = targets(args.backends)
    cases, more_notes = parse(args.methods, causal=args.causal, seed=args.seed)
    notes += more_notes
    out = _folder(args.out)

    with table.progress(len(cases) * len(chosen) * len(lengths)) as bar:
        rows, baseline, complete = _measure_all(cases, chosen, lengths, inputs, args.repeat, bar)
    settings = {"n": lengths, "causal": args.causal, "seed": args.seed, "repeat": args.repeat}
    facts = report.build(rows, inputs, chosen, settings=settings, complete=complete, baseline=baseline, notes=notes)
    title = report.title(facts)
    written = [report.write(facts, out / "compare.json")]
    if any(row.time is not None for row in rows):
        written.append(plot.draw(rows, out / "compare.png", title=title, baseline=baseline))
    table.show(rows, title=title, notes=notes, written=written, complete=complete, baseline=baseline)
    if not complete:
        return INTERRUPTED
    return FAILED if any(row.failure for row in rows) else 0


def _measure_all(
    cases: list[Case], chosen: list[Target], lengths: list[int], inputs: Inputs, repeat: int, bar: Progress
) -> tuple[list[Measurement], dict[int, float], bool]:
    """(rows, error of the mean of v by n, whether all cases finished); Ctrl-C ends the loop, and rows are kept."""
    rows: list[Measurement] = []
    baseline: dict[int, float] = {}
    try:
        for n in lengths:
            prefix = inputs.first(n)
            references: dict[str, np.ndarray] = {}
            for target in chosen:
                for case in cases:
                    bar.now(f"{target.label}, {case.label}, n = {n}")
                    problem = case.real(prefix)
                    if case.task not in references:
                        references[case.task] = case.reference(problem)
                        if isinstance(case, Attention):  # a method with a larger error is worse than ignoring q and k
                            mean = mean_of_values(prefix.q, prefix.v, causal=case.causal)
                            baseline[n] = relative_error(mean, references[case.task])
                    rows.append(measure(case, target, n, problem, references[case.task], repeat))
                    bar.advance()
    except KeyboardInterrupt:
        return rows, baseline, False
    return rows, baseline, True


def _lengths(text: str | None, inputs: Inputs) -> list[int]:
    if text is None:
        most = min(inputs.n, MOST_BY_DEFAULT)
        return sorted({max(1, most // 4), max(1, most // 2), most})
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        msg = f"--n is {text!r}; expected whole numbers separated by commas, e.g. 256,1024"
        raise CommandError(msg) from None
    if lengths[0] < 1:
        msg = f"--n holds {lengths[0]}; expected at least 1"
        raise CommandError(msg)
    if lengths[-1] > inputs.n:
        held = f"{inputs.source} has {inputs.n} tokens"
        msg = f"--n holds {lengths[-1]}, but {held}; ask for fewer or name a longer file"
        raise CommandError(msg)
    return lengths


def _folder(out: Path) -> Path:
    """Make the output folder and return it; before measuring, so that no result is lost to a mistyped path."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"--out {out}: cannot be made a folder ({error.strerror}); name one that can be written to"
        raise CommandError(msg) from error
    if not os.access(out, os.W_OK):
        msg = f"--out {out}: cannot be written to; name a folder that can"
        raise CommandError(msg)
    return out
