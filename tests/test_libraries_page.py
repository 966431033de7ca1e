"""The page of libraries is what docs/libraries.py found, of every method and scan that there is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import subquad
import subquad.scans
from subquad.registry import SCANS

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="installed without its source tree")


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[found.__name__] = found  # where dataclasses look for their module
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def content() -> Any:
    return json.loads((DOCS / "libraries.json").read_text(encoding="utf-8"))


def test_every_function_was_run_on_every_library(content: Any) -> None:
    functions = {*subquad.METHODS, *SCANS, "favor, in steps", "linear, in steps"}
    for name, row in content.items():
        assert set(row["functions"]) == functions, f"{name}: run docs/libraries.py {name}"
        assert row["version"], name


def test_what_is_not_right_raises(content: Any) -> None:
    for name, row in content.items():
        for function, cell in row["functions"].items():
            assert "raises" in cell or cell["error"] <= row["tolerance"], f"{function} on {name}"
    assert all("error" in cell for cell in content["numpy"]["functions"].values())


def test_the_table_has_every_cell(content: Any) -> None:
    pytest.importorskip("sphinx")
    lines = list(module(DOCS / "_ext" / "library_table.py").lines(content))
    for name, row in content.items():
        assert f"     - {row['version']}" in lines, name
        for cell in row["functions"].values():
            assert "error" in cell or any(cell["raises"].replace("`", "'") in line for line in lines)
    marks = sum(line.strip().removeprefix("- ") in ("✓", "–") for line in lines)
    assert marks == sum(len(row["functions"]) for row in content.values())


@pytest.mark.parametrize("name", ["marray", "ml_dtypes", "longdouble"])
def test_arrays_without_a_backend(name: str, content: Any) -> None:
    """Right, or refused by the error that the page shows."""
    script = module(DOCS / "libraries.py")
    row = script.ROWS[name]
    pytest.importorskip(row.module)
    for function, cell in script.run(row).items():
        if "raises" in content[name]["functions"][function]:
            assert cell.get("raises", "").startswith(("NotImplementedError", "TypeError")), function
        else:
            assert cell["error"] <= row.tolerance, function


def test_the_script_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy against itself, with an error put in."""
    script = module(DOCS / "libraries.py")
    calls = {name: script.calls()[name] for name in ("linear", "linear_scan")}
    monkeypatch.setattr(script, "calls", lambda: calls)
    assert all(cell["error"] == 0 for cell in script.run(script.ROWS["numpy"]).values())
    wrong = script.Row("numpy", lambda _, x: x + 1e-6 if x.dtype.kind == "f" else x)
    assert all(cell["error"] > 1e-9 for cell in script.run(wrong).values())
