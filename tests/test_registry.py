"""What is registered is measured: a new method and a new scan are in asv, in the gate and in compare."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("rich")
pytest.importorskip("asv")

import subquad
from asv_benchmarks import gate, harness
from subquad import registry
from subquad.cli import main


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Exact attention and the linear scan under other names."""

    @registry.register(
        "twin", cost="n n_kv (d + d_v)", size="implementation", defaults=({"implementation": "generic"},)
    )
    @dataclass(frozen=True)
    class Twin(subquad.Exact):
        pass

    row = registry.SCANS["linear_scan"]
    given = {name: getattr(row, name) for name in ("state", "decay", "draw", "cost", "positional")}

    @registry.register_scan("twin_scan", **given)
    def twin_scan(a: Any, b: Any, /, **options: Any) -> Any:
        return subquad.linear_scan(a, b, **options)

    yield
    del registry.METHODS["twin"], registry.SCANS["twin_scan"]


def test_asv_measures_them() -> None:
    with mock.patch.dict(os.environ, {"SUBQUAD_BENCH_BACKENDS": "numpy", "SUBQUAD_BENCH_PROFILE": "smoke"}):
        from asv_benchmarks.benchmarks import accuracy, operators, overhead, scaling

        for benchmark in (operators.Operator, scaling.Scaling, accuracy.Accuracy, overhead.Compile, overhead.Call):
            backends, names, *_ = benchmark().params
            assert backends == ["numpy"]
            assert {"twin", "twin causal", "twin_scan"} <= set(names)
        for name in ("twin causal", "twin_scan"):
            measured = operators.Operator()
            measured.setup("numpy", name, False, 256)
            measured.time_call()
            assert measured.track_extra_memory() >= 0


def test_the_gate_has_them_as_cases() -> None:
    cases = gate.cases()
    name, arrays, positional, options = cases["twin causal"]
    assert (name, list(arrays), positional) == ("attention", ["q", "k", "v"], 3)
    assert options == {"method": "twin", "causal": True}
    assert cases["twin_scan"][0] == "twin_scan"


def test_compare_shows_them(tmp_path: Path) -> None:
    assert main(["compare", "--backends", "numpy", "--n", "16", "--repeat", "1", "--out", str(tmp_path)]) == 0
    rows = {row["label"]: row for row in json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["results"]}
    assert rows["twin generic"]["error"] < 2e-6
    assert rows["twin_scan"]["error"] < 2e-6


def test_every_operator_draws_inputs_that_its_library_takes() -> None:
    for operator in harness.operators():
        problem = harness.case(operator).random(5)
        assert harness.prepare("numpy", problem).run().shape[-2] == 5
