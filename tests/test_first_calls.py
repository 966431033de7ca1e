"""The commands whose first calls are timed: each runs, and `subquad compare` takes its options."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("rich")

from asv_benchmarks.first_calls import CALLS, COMPARE, HEAD


@pytest.mark.parametrize("name", CALLS)
def test_a_call_runs(name: str) -> None:
    exec(HEAD + CALLS[name], {})


def test_compare_takes_its_options() -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([sys.executable, *COMPARE, "--help"], env=env, check=True, capture_output=True, text=True)
    assert "subquad compare" in told.stdout
