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

from asv_benchmarks.page.document import build, groups
from asv_benchmarks.page.results import read

GRID = [["'numpy'", "'torch'"], ["'exact'", "'favor'", "'<b>'"], ["False", "True"], ["256", "1024"]]
NAN = float("nan")


def benchmark(name: str, unit: str, names: list[str], params: list[list[str]]) -> dict:
    kind = "time" if unit == "seconds" else "track"
    return {"name": name, "unit": unit, "param_names": names, "params": params, "version": "1", "type": kind}


BENCHMARKS = {
    entry["name"]: entry
    for entry in (
        benchmark("attention.Attention.time_forward", "seconds", ["backend", "method", "causal", "n"], GRID),
        benchmark("attention.Attention.track_extra_memory", "bytes", ["backend", "method", "causal", "n"], GRID),
        benchmark("scaling.ScanScaling.track_exponent", "slope", ["backend"], [["'numpy'", "'torch'"]]),
        benchmark("overhead.Import.timeraw_subquad", "seconds", [], []),
    )
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of two commits, written by asv."""
    info = {
        "machine": "vm",
        "arch": "x86_64",
        "cpu": "a <fast> one",
        "num_cpu": "2",
        "os": "Linux",
        "ram": "8589934592",
    }
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
    records, (machine,) = read(folder)
    assert len(records) == 2 * (22 + 22 + 2 + 1)
    assert records[0].params == {"backend": "numpy", "method": "exact", "causal": False, "n": 256}
    assert [records[0].commit[0], records[-1].commit[0]] == ["a", "b"]
    assert "8 GiB" in machine.about


def test_page_is_self_contained(folder: Path) -> None:
    records, machines = read(folder)
    page = build(records, machines, {"a" * 40: "A <subject>"})
    targets = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
    assert targets
    assert all(target.startswith("data:") for target in targets)
    assert not re.search(r"<script|<link|@import|url\(|http", re.sub(r'src="data:[^"]*"', "", page))
    assert "A &lt;subject&gt;" in page
    assert "&lt;fast&gt;" in page


def test_one_figure_for_each_group(folder: Path) -> None:
    records, machines = read(folder)
    found = groups(records)
    names = [name for name, entry in BENCHMARKS.items() if entry["params"]]
    with_lengths = [name for name in names if "n" in BENCHMARKS[name]["param_names"]]
    assert {x.key for x in found} == {f"{x}-n" for x in with_lengths} | {f"{x}-commits" for x in BENCHMARKS}
    page = build(records, machines, {})
    assert page.count("<figure ") == len(found)
    assert page.count("<img ") == sum(len(x.panels) for x in found)
    assert all(x.panels and x.heading and x.caption for x in found)
