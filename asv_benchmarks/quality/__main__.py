"""Replace the attention of trained models by approximations: what their predictions and embeddings lose."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from asv_benchmarks import harness
from asv_benchmarks.quality import console, table
from asv_benchmarks.quality.packages import MINILM, SMOLLM2
from subquad.cli.errors import CommandError

MODELS = {"smollm2": (SMOLLM2, ["gguf", "tokenizers"]), "minilm": (MINILM, ["safetensors", "tokenizers"])}
LONGEST = 8192
TITLE = "Trained models with the attention of every layer replaced"


def main() -> int:
    args = _parser().parse_args()
    threads = harness.use_threads(args.threads)
    import torch

    torch.set_num_threads(threads)
    models = list(MODELS) if args.model == "all" else [args.model]
    rows: list[dict[str, Any]] = []
    try:
        for row in _measure(models, args):
            rows.append(row)
    except (CommandError, FileNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the tables hold what had finished\n")
    if not rows:
        return 130
    _show(rows)
    _write(args, threads, rows)
    return 1 if table.failures(rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("--model", choices=(*MODELS, "all"), default="all")
    methods = (
        "comma-separated names, options joined by colons, as in `subquad compare`; window:left=508:sinks=4 keeps the "
        "first four keys in sight. Default: all methods, as `subquad compare` runs them, and windows with four sinks"
    )
    add("--methods", metavar="LIST", help=methods)
    add("--lengths", metavar="LIST", type=_lengths, default=[2048, 4096, 8192],
        help="numbers of tokens of SmolLM2, comma-separated (default 2048,4096,8192)")  # fmt: skip
    add("--texts", choices=("report", "tune"), default="report", help="options are chosen on one pair of texts only")
    add("--seed", type=int, default=0, help="of random methods (default 0)")
    add("--threads", type=int, help="of PyTorch and subquad (default: the cores of this process)")
    add("--save", type=Path, default=harness.RESULTS / "quality.json", metavar="FILE.json", help="default: %(default)s")
    add("--join", action="store_true", help="keep what FILE.json holds, but for the rows that are measured again")
    return parser


def _lengths(text: str) -> list[int]:
    lengths = sorted({int(part) for part in text.split(",")})
    if not 4 <= lengths[0] <= lengths[-1] <= LONGEST:
        msg = f"{text} holds a length out of 4 … {LONGEST}, the context of the model"
        raise argparse.ArgumentTypeError(msg)
    return lengths


def _measure(models: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the models, the fast one first; notes and progress go to stderr."""
    from asv_benchmarks.quality import candidates, embeddings, language

    def now(what: str) -> None:
        sys.stderr.write(f"{what}\n")

    # all are found before the first is measured, which takes minutes
    causal, notes = candidates.find(args.methods, causal=True, seed=args.seed)
    bidirectional, _ = candidates.find(args.methods, causal=False, seed=args.seed)
    if "minilm" in models:
        yield from embeddings.measure(bidirectional, args.texts, now)
    if "smollm2" in models:
        for note in notes:
            now(note)
        yield from language.measure(causal, args.lengths, args.texts, now)


def _show(rows: list[dict[str, Any]]) -> None:
    for title, (header, *cells) in table.tables(rows):
        console.show(title, header, cells)
    for line in table.failures(rows):
        console.console().print(Text(line))


def _write(args: argparse.Namespace, threads: int, rows: list[dict[str, Any]]) -> None:
    from asv_benchmarks.quality import texts

    used = [
        {"kind": kind, "use": args.texts, "from": list(texts.SOURCES[kind, args.texts]),
         "sha256": texts.digest(texts.read(kind, args.texts))}
        for kind in texts.KINDS
    ]  # fmt: skip
    command = " ".join(["quality", *sys.argv[1:]])
    if args.join and args.save.exists():
        before = json.loads(args.save.read_text())
        if before["texts"] != used:
            sys.stderr.write(f"{args.save} is of other texts: its rows are not kept\n")
        else:
            rows = joined(before["rows"], rows)
            start = "python -m asv_benchmarks."  # which `harness.write` puts before the first
            command = f"{before['command'].removeprefix(start)}; {start}{command}"
    packages = dict.fromkeys(x for row in rows for x in (MODELS[row["model"]][0], *MODELS[row["model"]][1]))
    versions = ["numpy", "torch", *packages]
    harness.write(args.save, command, title=TITLE, packages=versions, threads=threads, texts=used, rows=rows)


def joined(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a record, those that were measured again in the place of the old ones, and new ones at the end."""
    found = [
        {tuple(row[name] for name in ("model", "text", "n", "method")): row for row in some} for some in (before, rows)
    ]
    return list((found[0] | found[1]).values())


if __name__ == "__main__":
    sys.exit(main())
