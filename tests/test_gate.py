"""The regression gate: a neighbour's noise raises no alarm, a slowdown does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from asv_benchmarks.gate import measure, trees
from asv_benchmarks.gate.cases import CASES
from asv_benchmarks.gate.measure import Slowdown
from asv_benchmarks.gate.trees import ROOT, NoBaseError, checked_out, find_commit

CASE = "selective_scan_step"
PAIRS = 15


@pytest.fixture
def head() -> str:
    if shutil.which("git") is None:
        pytest.skip("git is absent")
    try:
        return find_commit("HEAD")
    except NoBaseError as error:
        pytest.skip(f"{ROOT} is no repository: {error}")


@pytest.fixture
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CASE_SECONDS", 0.02)


def samples(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of equal code on a machine that a neighbour slows down, by up to three times, half of the time."""
    rng = np.random.default_rng(seed)
    return tuple(1 + rng.integers(0, 2, (2, PAIRS)) * rng.uniform(0, 2, (2, PAIRS)))


@pytest.mark.parametrize("seed", range(20))
def test_noise_looks_like_no_slowdown(seed: int) -> None:
    assert Slowdown.of(*samples(seed)).least < 1.5


@pytest.mark.parametrize("seed", range(20))
def test_a_quiet_half_shows_the_slowdown(seed: int) -> None:
    """Noise that both sides share leaves the ratio as it is."""
    noise, _ = samples(seed)
    assert Slowdown.of(noise, 2 * noise).least == pytest.approx(2)


def test_a_lucky_sample_of_the_base_is_not_enough() -> None:
    base, tree = np.ones(PAIRS), np.ones(PAIRS)
    base[3] = 0.4
    assert Slowdown.of(base, tree).least == 1
    assert Slowdown.of(base, tree).most == 2.5


def test_most_pairs_disturbed_is_not_enough() -> None:
    base, tree = np.ones(PAIRS), np.full(PAIRS, 3.0)
    tree[3] = 1.05
    assert Slowdown.of(base, tree).least == pytest.approx(1.05)


@pytest.mark.usefixtures("_briefly")
@pytest.mark.parametrize(("injected", "alarm"), [(1, False), (12, True)])
def test_the_working_tree_against_itself(injected: int, alarm: bool) -> None:
    (finding,) = measure.compare(ROOT, ROOT, [CASE], factor=4, injected=injected)
    assert finding.base_failure is None
    assert finding.tree_failure is None
    assert finding.is_alarm(4) == alarm, finding


@pytest.mark.usefixtures("_briefly")
def test_the_files_of_a_commit_are_measured(head: str) -> None:
    """How fast they are is not asked: the working tree may be faster or slower."""
    with checked_out(head) as base:
        (finding,) = measure.compare(base, ROOT, [CASE], factor=4)
    if finding.base_failure:
        pytest.skip(f"HEAD cannot run the case: {finding.base_failure}")
    assert finding.tree_failure is None
    assert finding.slowdown is not None


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "PATIENCE", 0.5)
    (tmp_path / "subquad").mkdir()
    (tmp_path / "subquad" / "__init__.py").write_text("import time; time.sleep(60)")
    with trees.workers(tmp_path) as (worker,):
        worker.ask("prepare", CASE)
        assert "ended with" in worker.answer()["failure"]


def test_a_case_that_the_base_lacks_is_new(tmp_path: Path) -> None:
    (tmp_path / "subquad").mkdir()
    (tmp_path / "subquad" / "__init__.py").write_text("")
    (finding,) = measure.compare(tmp_path, ROOT, [CASE], factor=1.5)
    assert finding.base_failure is not None
    assert "selective_scan_step" in finding.base_failure
    assert not finding.is_alarm(1.5)


def test_a_case_that_the_working_tree_lost_is_an_alarm(tmp_path: Path) -> None:
    (tmp_path / "subquad").mkdir()
    (tmp_path / "subquad" / "__init__.py").write_text("")
    (finding,) = measure.compare(ROOT, tmp_path, [CASE], factor=1.5)
    assert finding.tree_failure is not None
    assert finding.is_alarm(1.5)


def test_a_tree_without_the_package_is_noticed(tmp_path: Path) -> None:
    """Another copy may be installed: it must not be measured in its place."""
    (finding,) = measure.compare(tmp_path, ROOT, [CASE], factor=1.5)
    assert finding.base_failure is not None
    assert finding.slowdown is None


def test_cases_run() -> None:
    import subquad  # noqa: F401  the cases import it by themselves

    for make in CASES.values():
        assert make()() is not None
