"""Time and error of each peer and of subquad on this machine: equal inputs, one process, calls in turn."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asv_benchmarks import harness
from subquad.cli.digits import three_digits

MODULES = {"attention": "attention", "scan": "scans", "recurrences": "recurrences"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.peers", description=__doc__)
    parser.add_argument("suite", nargs="?", choices=MODULES, default="attention")
    parser.add_argument(
        "--n", type=int, help="sequence length (default 8192 for attention, 2048 for the scan, 4096 for recurrences)"
    )
    parser.add_argument("--repeat", type=int, default=7, help="interleaved pairs (default 7)")
    parser.add_argument("--threads", type=int, help="of each library (default: the cores of this process)")
    parser.add_argument("--only", default="", metavar="TEXT", help="peers whose name contains it; writes no file")
    parser.add_argument("--out", type=Path, help="JSON file (default asv_benchmarks/results/peers-SUITE.json)")
    args = parser.parse_args()
    threads = harness.use_threads(args.threads)
    import torch

    torch.set_num_threads(threads)
    suite = importlib.import_module(f"asv_benchmarks.peers.{MODULES[args.suite]}")
    n = args.n or suite.N
    title, rows = suite.measure(n, args.repeat, [peer for peer in suite.PEERS if args.only in peer.name])
    Console(width=160).print(table(f"{title}, {threads} threads", rows))
    if args.only and args.out is None:
        return
    given = {"n": args.n, "threads": args.threads, "repeat": args.repeat if args.repeat != 7 else None}
    flags = [f" --{name} {value}" for name, value in given.items() if value]
    out = args.out or harness.RESULTS / f"peers-{args.suite}.json"
    command = f"peers {args.suite}{''.join(flags)}"
    harness.write(out, command, title=title, packages=suite.PACKAGES, threads=threads, n=n, rows=rows)


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    ratio, errors = ("median", "least", "most"), ("error_ours", "error_theirs", "error_mean")
    columns = ("peer", "theirs / ms", "ours / ms", "theirs / ours", "least", "most", "pairs")
    shown = Table(*columns, "error: ours", "theirs", "mean of v", title=title)
    for row in rows:
        cells = [three_digits(row["theirs_ms"]), three_digits(row["ours_ms"])]
        cells += [three_digits(row["ratio"][name]) for name in ratio]
        found = [f"{row[name]:.3g}" if name in row else "–" for name in errors]
        shown.add_row(row["peer"], *cells, str(row["pairs"]), *found)
    return shown


if __name__ == "__main__":
    main()
