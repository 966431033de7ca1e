"""The report of a GPU run: what does not need a GPU."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from asv_benchmarks.gpu import correctness, table
from asv_benchmarks.gpu.table import CRITERIA, verdict
from subquad_cupy.device import STORAGE
from subquad_cupy.selective_scan import plan


def rows(lines):
    """Cells of the rows of a table."""
    indented = [line for line in lines if line.startswith('   "')]
    return list(csv.reader(indented, skipinitialspace=True))


def test_a_nan_is_no_small_error():
    want = np.array([1.0, 2.0])
    assert correctness.relative_error(np.float32([1, 2.5]), want) == 0.25
    assert correctness.relative_error(np.float32([1, np.nan]), want) == math.inf


def test_every_instantiation_is_checked():
    """Every number of states that is launched, every choice of constant maps."""
    assert set(correctness.STATES) == {plan.padded_states(n) for n in range(1, plan.MAX_STATES + 1)}
    assert sorted("".join(form) for form in correctness.FORMS) == ["", "B", "BC", "C"]
    assert correctness.ALLOWED.keys() | {"float64"} == STORAGE.keys()


@pytest.mark.parametrize("measured", [0, math.inf, math.nan, None])
def test_the_verdict_says_of_each_criterion_whether_it_was_met(measured):
    found = {} if measured is None else {key: measured for key, *_ in CRITERIA}
    wanted = {0: "≤", math.inf: "≥"}.get(measured)  # NaN, or nothing, meets none
    assert [met for *_, met in rows(verdict(found))] == [
        "yes" if sign == wanted else "**no**" for _, _, sign, _ in CRITERIA
    ]


def test_an_exception_fits_into_a_cell():
    told = table.told(ValueError('a "quoted" `name`, *starred*\nand more'))
    assert rows([table.row(1, told)]) == [["1", "``ValueError: a 'quoted' 'name', *starred*``"]]


def test_the_page_is_shown():
    docs = Path(__file__).parents[1] / "docs"
    assert (docs / "gpu.rst").exists()
    assert "\n   gpu\n" in (docs / "index.rst").read_text(encoding="utf-8")
