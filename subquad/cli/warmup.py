"""`subquad warmup`: compile and keep what operators need, for an image of a container or before a first request."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from subquad.cli.cases import Case, find_case, parse, reason_against_causal, shown
from subquad.cli.errors import CommandError, missing_for
from subquad.cli.libraries import Target, targets
from subquad.cli.measure import Prepared

LENGTHS = 64, 2048  # tokens of the calls: short ones have kernels of their own, long ones all others
DTYPES = ("float32", "float64", "float16", "bfloat16")
FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand to its parser."""
    add = parser.add_argument
    default = ", ".join(dict.fromkeys(name for name, _ in shown()))
    add(
        "--method",
        "--methods",
        nargs="+",
        metavar="NAME",
        help=f"methods and scans, such as favor linear_scan. Default: {default}",
    )
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], metavar="NAME",
        help=f"dtypes of the arrays, among {', '.join(DTYPES)}. Default: float32")  # fmt: skip
    where = "comma-separated array libraries, as `subquad info` lists them. Default: all that are usable"
    add("--backends", metavar="LIST", help=where)


def run(args: argparse.Namespace) -> int:
    """Call every operator once for each dtype and library; return the exit code."""
    try:
        from subquad.cli import table
    except ModuleNotFoundError as error:
        raise CommandError(missing_for("warmup", error)) from error
    chosen, notes = targets(args.backends)
    reasons = {x.label: x.bench.why_not_compiled() for x in chosen if hasattr(x.bench, "why_not_compiled")}
    notes += [f"{label}: nothing is compiled for the CPU, since {why}" for label, why in reasons.items() if why]
    names = ",".join(dict.fromkeys(args.method or [name for name, _ in shown()]))
    cases, _ = parse(names, causal=False, seed=0)
    calls = [
        call
        for target in chosen
        if reasons.get(target.label) is None or target.device != "cpu"
        for dtype in args.dtype
        for case in cases
        for call in _calls(case, target, dtype)
    ]
    start, failures = time.perf_counter(), []
    with table.progress(len(calls)) as bar:
        for label, call in calls:
            bar.now(label)
            try:
                call()
            except Exception as error:
                failures.append(f"{label}: {type(error).__name__}: {' '.join(str(error).split())}")
            bar.advance()
    for line in (*notes, *failures):
        print(line)
    print(f"{len(calls) - len(failures)} calls are compiled, in {time.perf_counter() - start:.1f} s")
    return FAILED if failures else 0


def _calls(case: Case, target: Target, dtype: str) -> list[tuple[str, Callable[[], Any]]]:
    """The calls of an operator, with words for each: causal or not, and gradients where the library has them."""
    forms = {"": case}
    if case.task == "attention" and reason_against_causal(case) is None:
        forms[", causal"] = find_case(case.name, case.options, causal=True, seed=0)
    gradients = (False, True) if hasattr(target.bench, "gradient") else (False,)
    return [
        (f"{target.label}, {form.label}{words}, {dtype}{', gradients' * gradient}",
         partial(_call, form, target, dtype, gradient))
        for words, form in forms.items()
        for gradient in gradients
    ]  # fmt: skip


def _call(case: Case, target: Target, dtype: str, gradient: bool) -> None:
    for problem in map(case.random, LENGTHS):
        Prepared(target, problem.bind(), tuple(problem.arrays.values()), gradient=gradient, dtype=dtype).run()
