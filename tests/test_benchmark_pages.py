"""Tables and pictures of the documentation are made from the JSON of the measurements."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "_ext"))

results = importlib.import_module("results")

MEASUREMENTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results.RESULTS.glob("*.json")}


def cells(table: str) -> list[str]:
    return re.findall(r"^ {3}[* ] - (.*)$", table, re.MULTILINE)


def test_every_measurement_is_shown() -> None:
    pages = "".join((ROOT / "docs" / f"{name}.rst").read_text(encoding="utf-8") for name in ("benchmarks", "quality"))
    assert set(re.findall(r"^\.\. results:: (\S+)$", pages, re.MULTILINE)) == set(MEASUREMENTS)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_tables_hold_every_row(name: str) -> None:
    content = MEASUREMENTS[name]
    tables, draw = results.views(content)
    name = next(x for x in ("peer", "method", "name") if x in content["rows"][0])
    assert {row[name] for row in content["rows"]} <= set(cells("\n".join(tables(content))))
    picture = io.BytesIO()
    draw(content).savefig(picture, format="svg")
    assert picture.tell() > 10_000
    assert content["command"] in results.provenance(content)


def test_memory_that_is_not_seen_is_a_bound() -> None:
    """4 GB, 0.4 MB and 0.5 MB, and 67.1 MB more for q, k, v and the output."""
    sizes = {"large": 4e9, "small": 4e5, "ours": 5e5}
    rows: list[dict[str, Any]] = [
        {"name": x, "group": "", "n": 8192, "ms": {"median": 1.0}, "extra_bytes": size} for x, size in sizes.items()
    ]
    content = MEASUREMENTS["nystromformer"] | {"baselines": ["large", "small"], "rows": rows}
    memory, summary = results.paper(content)[2:4]
    assert cells(memory)[-6:] == ["large", "4000 (1.00×)", "small", "< 1 (> 4000×)", "ours", "< 1 (> 4000×)"]
    assert cells(summary)[-7:] == ["ours", "1.00×", "1.00×", "> 4000×", "–", "> 59.7×", "–"]
