"""`python -m asv_benchmarks.half`: time and memory of calls in half precision, beside those of calls in float32.

All calls of an operator take turns in one process: float32, bfloat16 and float16 on PyTorch, and on NumPy,
whose bfloat16 is that of `ml_dtypes`. A ratio is that of the medians. Memory is the most that is held beyond inputs and
outputs, less what the call in float32 holds.
"""

from __future__ import annotations

import argparse
import re
import statistics
from typing import Any

import ml_dtypes
import numpy as np

from asv_benchmarks import frameworks, harness
from subquad.cli.cases import Problem, is_quadratic
from subquad.cli.measure import Prepared

N, SHORT = 4096, 1024  # tokens; of what takes quadratic time
HALF = ("bfloat16", "float16")


def problems() -> dict[str, Problem]:
    """Every operator of the registry, the selective scan with both kinds of rates."""
    found = {}
    for name in harness.operators():
        case = harness.case(name)
        found[name] = case.random(SHORT if is_quadratic(case) else N)
    del found["selective_scan"]
    return found | {name: frameworks.problem(name) for name in frameworks.SCANS}


def calls(library: str, problem: Problem) -> dict[str, Prepared]:
    """The call in float32 and in half precision, by dtype."""
    found = {"float32": harness.prepare(library, problem)}
    for dtype in HALF:
        if library == "numpy":  # NumPy alone knows no bfloat16
            kind: Any = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
            arrays = {name: x.astype(kind) if x.dtype.kind == "f" else x for name, x in problem.arrays.items()}
            found[dtype] = harness.prepare(library, Problem(problem.function, arrays, problem.options))
        else:
            found[dtype] = harness.prepare(library, problem, dtype=dtype)
    return found


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.half", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="operators to measure")
    parser.add_argument("--libraries", default="torch,numpy")
    parser.add_argument("--repeat", type=int, default=21)
    args = parser.parse_args()
    libraries, columns = args.libraries.split(","), []
    for library in libraries:
        columns += [f"{library} ms", *HALF, "memory / MB"]
    table = Table("", *columns, title=f"times of half precision by those of float32, medians of {args.repeat}")
    for name, problem in problems().items():
        if not re.search(args.only, name):
            continue
        cells = []
        for library in libraries:
            prepared = calls(library, problem)
            times = harness.interleave({dtype: x.run for dtype, x in prepared.items()}, args.repeat)
            middle = {dtype: statistics.median(found) for dtype, found in times.items()}
            memory = {dtype: x.extra_memory() or 0 for dtype, x in prepared.items()}
            more = max(memory[dtype] for dtype in HALF) - memory["float32"]
            ratios = [f"{middle[dtype] / middle['float32']:.2f}" for dtype in HALF]
            cells += [f"{1e3 * middle['float32']:.2f}", *ratios, f"{more / 1e6:.1f}"]
        table.add_row(name, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
