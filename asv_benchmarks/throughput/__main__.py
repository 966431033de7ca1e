"""Tokens per second of whole language models, and memory beyond their weights."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asv_benchmarks import harness
from asv_benchmarks.throughput import weights
from asv_benchmarks.throughput.cases import ALONE, CASES
from asv_benchmarks.throughput.measure import measure
from subquad.cli.digits import three_digits

MODELS = {"Mamba": "subquad, NumPy, float32", "transformer": "transformers, Llama"}
PEERS = tuple(x for x in CASES if x != "transformers, Llama")
PACKAGES = ("numpy", "llvmlite", "torch", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.throughput", description=__doc__)
    parser.add_argument("--peers", action="store_true", help="one Mamba by each implementation, batch 1 and 8")
    parser.add_argument("--n", type=int, default=2048, help="tokens of the prompt (default 2048)")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences that are continued (default 1 … 32, or 1 8)")
    parser.add_argument("--threads", type=int, help="of each library (default: the cores of this process)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it; writes no file")
    parser.add_argument("--out", type=Path, help="JSON file (default asv_benchmarks/results/throughput[-peers].json)")
    args = parser.parse_args()
    threads = harness.use_threads(args.threads)
    batches = args.batches or ([1, 8] if args.peers else harness.doubling(1, 32))
    names = {x: x for x in PEERS} if args.peers else MODELS
    console, rows = Console(width=160), []
    with tempfile.TemporaryDirectory() as name:
        weights.write(Path(name))
        for model, case in names.items():
            if args.only not in model:
                continue
            some = [1] if case in ALONE else batches
            rows += [{"name": model} | row for row in measure(Path(name), threads, case, args.n, some)]
            console.print(table(rows, args.n))
    if args.only and args.out is None:
        return
    out = args.out or harness.RESULTS / f"throughput{'-peers' if args.peers else ''}.json"
    flags = [*(["--peers"] if args.peers else []), *([f"--threads {args.threads}"] if args.threads else [])]
    title = f"Generation after a prompt of {args.n} tokens"
    command = " ".join(["throughput", *flags])
    harness.write(out, command, title=title, packages=PACKAGES, threads=threads, n=args.n, rows=rows)


def table(rows: list[dict[str, Any]], n: int) -> Table:
    shown = Table("model", "batch", "prompt, s", "ms a step", "tokens/s", "MB, prompt", "MB, steps", title=f"n = {n}")
    for row in rows:
        step = row["step"]["median"]
        cells = (
            row["prompt"]["least"],
            1e3 * step,
            row["batch"] / step,
            *(row[x] / 1e6 for x in ("prompt_bytes", "step_bytes")),
        )
        shown.add_row(row["name"], str(row["batch"]), *map(three_digits, cells))
    return shown


if __name__ == "__main__":
    main()
