"""The tables of the documentation say what the JSON of the measurements says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asv_benchmarks.render.tables import description, read, text

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "benchmarks"
MEASUREMENTS = read()


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_page_is_generated_from_its_measurement(name: str) -> None:
    """Table and picture. If it fails: python -m asv_benchmarks.render, and commit what it writes."""
    assert (PAGES / f"{name}.rst").read_text(encoding="utf-8") == text(name, MEASUREMENTS[name])
    assert description(MEASUREMENTS[name]) in (PAGES / f"{name}.svg").read_text(encoding="utf-8")


def test_every_page_has_a_measurement_and_is_shown() -> None:
    assert {path.stem for path in PAGES.glob("*.rst")} == set(MEASUREMENTS)
    shown = (ROOT / "docs" / "benchmarks.rst").read_text(encoding="utf-8")
    assert all(f"include:: benchmarks/{name}.rst" in shown for name in MEASUREMENTS)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_picture_is_the_same_twice(name: str, tmp_path: Path) -> None:
    """So that a picture changes in a commit only if its numbers did."""
    pictures = pytest.importorskip("asv_benchmarks.render.pictures")
    first, second = (pictures.draw(MEASUREMENTS[name], tmp_path / f"{i}.svg").read_bytes() for i in "ab")
    assert first == second


def test_memory_that_is_not_seen_is_a_bound() -> None:
    """4 GB, 0.4 MB and 0.5 MB, and 67.1 MB more for q, k, v and the output."""
    sizes = {"large": 4e9, "small": 4e5, "ours": 5e5}
    rows = [
        {"name": x, "group": "", "n": 8192, "ms": {"median": 1.0}, "extra_bytes": size} for x, size in sizes.items()
    ]
    page = text("", MEASUREMENTS["nystromformer"] | {"baselines": ["large", "small"], "rows": rows})
    _, _, memory, summary = page.split(".. list-table::")
    assert cells(memory)[-6:] == ["large", "4000 (1.00×)", "small", "< 1 (> 4000×)", "ours", "< 1 (> 4000×)"]
    assert cells(summary)[-7:] == ["ours", "1.0×", "1.0×", "> 4000.0×", "–", "> 59.7×", "–"]


def cells(table: str) -> list[str]:
    return re.findall(r"^ {3}[* ] - (.*)$", table, re.MULTILINE)
