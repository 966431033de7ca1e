"""The page of benchmark results: one figure for each group, and nothing fetched from elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("asv")
pytest.importorskip("matplotlib")

from asv.machine import Machine
from asv.results import Results
from asv.runner import BenchmarkResult

from asv_benchmarks.page import build, figures, read

GRID = [["'numpy'", "'torch'"], ["'exact'", "'favor causal'", "'<b>'"], ["False", "True"], ["256", "1024"]]
NAMES = ["backend", "operator", "gradient", "n"]
NAN = float("nan")


def benchmark(name: str, unit: str, names: list[str], params: list[list[str]]) -> dict:
    kind = "time" if unit == "seconds" else "track"
    return {"name": name, "unit": unit, "param_names": names, "params": params, "version": "1", "type": kind}


BENCHMARKS = {
    entry["name"]: entry
    for entry in (
        benchmark("operators.Operator.time_call", "seconds", NAMES, GRID),
        benchmark("operators.Operator.track_extra_memory", "bytes", NAMES, GRID),
        benchmark("scaling.Scaling.track_exponent", "slope", ["backend"], [["'numpy'", "'torch'"]]),
        benchmark("overhead.Import.timeraw_subquad", "seconds", [], []),
    )
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of two commits, written by asv."""
    info = {"machine": "vm", "arch": "x86_64", "cpu": "a <fast> one", "num_cpu": "2", "os": "Linux", "ram": "8"}
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "machine.json").write_text(json.dumps(info | {"version": Machine.api_version}))
    (tmp_path / "benchmarks.json").write_text(json.dumps(BENCHMARKS | {"version": 2}))
    for i, commit in enumerate(("a" * 40, "b" * 40)):
        results = Results(info | {"python": "3.11"}, {}, commit, 1_700_000_000_000 + i, "3.11", "existing-py", {})
        for entry in BENCHMARKS.values():
            size = 1
            for values in entry["params"]:
                size *= len(values)
            values = [0.001 * (k + 1) for k in range(size)]
            if size > 2:
                values[1], values[2] = NAN, None  # n/a, failed
            none = [None] * size
            results.add_result(entry, BenchmarkResult(values, none, none, 0, "", None), record_samples=False)
        results.save(str(tmp_path))
    return tmp_path


def test_records_are_the_numbers_alone(folder: Path) -> None:
    records = read(folder)
    assert len(records) == 2 * (22 + 22 + 2 + 1)
    assert records[0].params == {"backend": "numpy", "operator": "exact", "gradient": False, "n": 256}
    assert [records[0].commit[0], records[-1].commit[0]] == ["a", "b"]
    assert {record.line for record in records} == {
        "", "exact", "exact gradient", "favor causal", "favor causal gradient", "<b>", "<b> gradient",
    }  # fmt: skip


def test_page_is_self_contained(folder: Path) -> None:
    page = build(read(folder))
    targets = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
    assert targets
    assert all(target.startswith("data:") for target in targets)
    assert not re.search(r"<script|<link|@import|url\(|http", re.sub(r'src="data:[^"]*"', "", page))
    assert "&lt;fast&gt;" in page
    assert "<b>" not in page


def test_one_figure_for_each_group(folder: Path) -> None:
    found = list(figures(read(folder)))
    lengths = [name for name, entry in BENCHMARKS.items() if "n" in entry["param_names"]]
    titles = {re.sub(r", n = \d+", "", title) for title, *_ in found}
    assert titles == {f"{name}, by length" for name in lengths} | {f"{name}, by commit" for name in BENCHMARKS}
    page = build(read(folder))
    assert page.count("<figure>") == len(found)
    assert page.count("<img ") == sum(len(panels) for _, panels, _ in found)
