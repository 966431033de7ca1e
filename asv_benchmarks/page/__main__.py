"""`python -m asv_benchmarks.page --out DIR`: asv's results as one file, `index.html`, that needs no network."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from asv.util import UserError

from asv_benchmarks.page.document import build
from asv_benchmarks.page.results import read

FOLDER = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.page", description=__doc__)
    results = FOLDER / ".asv" / "results"
    parser.add_argument("--results", type=Path, default=results, help="folder of asv's results (default: asv's own)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for index.html")
    args = parser.parse_args()
    try:
        records, machines = read(args.results)
    except UserError as error:
        parser.error(f"{args.results}: {error}")
    if not records:
        parser.error(f"{args.results} holds no numbers; `asv run` with --set-commit-hash keeps some")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "index.html"
    page = build(records, machines, subjects(dict.fromkeys(record.commit for record in records)))
    path.write_text(page, encoding="utf-8")
    print(f"{path}: {len(records)} numbers, {path.stat().st_size / 1e6:.1f} MB")
    return 0


def subjects(commits: Iterable[str]) -> dict[str, str]:
    """The first line of each commit's message, as far as git knows the commit."""
    show = ["git", "-C", str(FOLDER), "show", "--no-patch", "--format=%s"]
    found = {}
    for commit in commits:
        with suppress(OSError, subprocess.CalledProcessError):
            done = subprocess.run([*show, commit], check=True, capture_output=True, text=True)
            found[commit] = done.stdout.strip()
    return found


if __name__ == "__main__":
    sys.exit(main())
