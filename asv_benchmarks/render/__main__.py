"""Write docs/benchmarks/NAME.rst and NAME.svg for each asv_benchmarks/results/NAME.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from asv_benchmarks.render import pictures
from asv_benchmarks.render.tables import read, text

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.render", description=__doc__)
    parser.add_argument("--into", type=Path, default=DOCS, help="folder (default docs/benchmarks)")
    into = parser.parse_args().into
    into.mkdir(parents=True, exist_ok=True)
    for name, record in read().items():
        (into / f"{name}.rst").write_text(text(name, record), encoding="utf-8")
        pictures.draw(record, into / f"{name}.svg")


if __name__ == "__main__":
    main()
