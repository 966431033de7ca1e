"""Measure one of the papers' tables on this machine and write it as JSON."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asv_benchmarks import harness
from asv_benchmarks.papers import memory
from asv_benchmarks.papers.paper import Paper, times
from subquad.cli.digits import three_digits

TABLES = ("nystromformer", "mamba", "performer")
REPEAT, SECONDS = 7, 15.0  # max rounds of a length, and seconds after which they stop earlier


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.papers", description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--quick", action="store_true", help="short lengths, three rounds: to see that it works")
    parser.add_argument("--threads", type=int, help="of each library (default: the cores of this process)")
    parser.add_argument("--out", type=Path, help="JSON file (default asv_benchmarks/results/TABLE.json)")
    args = parser.parse_args()
    threads = harness.use_threads(args.threads)
    import torch

    torch.set_num_threads(threads)
    module = importlib.import_module(f"asv_benchmarks.papers.{args.table}")
    paper: Paper = module.PAPER
    lengths = paper.quick if args.quick else paper.lengths
    rows = list(times(paper, lengths, 3 if args.quick else REPEAT, SECONDS))
    kept = ("source", "baselines", "notes", "summary", "instance_bytes")
    content: dict[str, Any] = {name: getattr(paper, name) for name in kept}
    if paper.instance_bytes:
        found = {(x["name"], x["n"]): x for x in memory.measure(args.table, lengths, threads)}
        rows = [row | found[row["name"], row["n"]] for row in rows]
    if hasattr(module, "crossover"):
        content["crossover"] = module.crossover(rows)
    show(paper, rows, content.get("crossover"))
    flags = [*([" --quick"] if args.quick else []), *([f" --threads {args.threads}"] if args.threads else [])]
    out, packages = args.out or harness.RESULTS / f"{args.table}.json", ["numpy", *paper.packages]
    command = f"papers {args.table}{''.join(flags)}"
    harness.write(out, command, title=paper.title, packages=packages, threads=threads, **content, rows=rows)


def show(paper: Paper, rows: list[dict[str, Any]], crossover: float | None) -> None:
    lengths = sorted({row["n"] for row in rows})
    units = {"ms": lambda row: three_digits(row["ms"]["median"])}
    if paper.instance_bytes:
        units["MB beyond inputs and output"] = lambda row: three_digits(row["extra_bytes"] / 1e6)
    console = Console(width=160)
    for unit, text in units.items():
        table = Table(unit, *map(str, lengths), title=paper.title)
        for group, name in dict.fromkeys((row["group"], row["name"]) for row in rows):
            cells = {row["n"]: text(row) for row in rows if (row["group"], row["name"]) == (group, name)}
            table.add_row(", ".join(filter(None, (name, group))), *(cells.get(n, "–") for n in lengths))
        console.print(table)
    if crossover is not None:
        console.print(f"faster than attention from n = {crossover:.0f}")


if __name__ == "__main__":
    main()
