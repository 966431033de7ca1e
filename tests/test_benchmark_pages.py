"""The tables of the documentation say what the JSON of the measurements says."""

from __future__ import annotations

from pathlib import Path

import pytest

from asv_benchmarks.render.tables import read, text

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "benchmarks"
MEASUREMENTS = read()


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_page_is_generated_from_its_measurement(name: str) -> None:
    """If it fails: python -m asv_benchmarks.render, and commit what it writes."""
    assert (PAGES / f"{name}.rst").read_text(encoding="utf-8") == text(name, MEASUREMENTS[name])
    assert (PAGES / f"{name}.svg").is_file()


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
