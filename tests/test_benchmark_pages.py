"""Tables and pictures of the documentation are made from the JSON of the measurements."""

from __future__ import annotations

import importlib
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
    page = (ROOT / "docs" / "benchmarks.rst").read_text(encoding="utf-8")
    assert set(re.findall(r"^\.\. results:: (\S+)$", page, re.MULTILINE)) == set(MEASUREMENTS)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_tables_hold_every_row(name: str) -> None:
    content = MEASUREMENTS[name]
    is_peers = "peer" in content["rows"][0]
    shown = cells("\n".join((results.peers if is_peers else results.paper)(content)))
    assert {row["peer" if is_peers else "name"] for row in content["rows"]} <= set(shown)
    figure = (results.draw_peers if is_peers else results.draw_paper)(content)
    assert figure.axes
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
