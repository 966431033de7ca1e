"""The regression gate: noise of other processes raises no alarm, a slowdown does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")

from asv_benchmarks import gate, harness, tree
from asv_benchmarks.gate import Finding, compare
from asv_benchmarks.harness import ROOT
from subquad.cli import clock

CASE = {"selective_scan step": gate.cases()["selective_scan step"]}
PAIRS = 15


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The files of HEAD."""
    if shutil.which("git") is None or not harness.git("rev-parse", "HEAD"):
        pytest.skip(f"{ROOT} is no repository, or git is absent")
    return tree.check_out(ROOT, "HEAD", tmp_path)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A tree whose subquad has nothing in it."""
    (tmp_path / "subquad").mkdir()
    (tmp_path / "subquad" / "__init__.py").write_text("")
    return tmp_path


@pytest.fixture
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "CASE_SECONDS", 0.02)


def slower(base: Sequence[float], tree: Sequence[float]) -> tuple[float, float]:
    return Finding("", {"base": list(base), "tree": list(tree)}, {}).slower


def samples(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of equal code on a machine that a neighbour slows down, by up to three times, half of the time."""
    rng = np.random.default_rng(seed)
    return tuple(1 + rng.integers(0, 2, (2, PAIRS)) * rng.uniform(0, 2, (2, PAIRS)))


@pytest.mark.parametrize("seed", range(20))
def test_noise_looks_like_no_slowdown(seed: int) -> None:
    assert min(slower(*samples(seed))) < 1.5


@pytest.mark.parametrize("seed", range(20))
def test_a_quiet_half_shows_the_slowdown(seed: int) -> None:
    """Noise that both sides share leaves the ratio as it is."""
    noise, _ = samples(seed)
    assert min(slower(noise, 2 * noise)) == pytest.approx(2)


def test_a_lucky_sample_of_the_base_is_not_enough() -> None:
    base, tree = np.ones(PAIRS), np.ones(PAIRS)
    base[3] = 0.4
    assert min(slower(base, tree)) == 1
    assert max(slower(base, tree)) == 2.5


def test_most_pairs_disturbed_is_not_enough() -> None:
    base, tree = np.ones(PAIRS), np.full(PAIRS, 3.0)
    tree[3] = 1.05
    assert min(slower(base, tree)) == pytest.approx(1.05)


@pytest.mark.usefixtures("_briefly")
@pytest.mark.parametrize(("injected", "alarm"), [(1, False), (60, True)])
def test_the_working_tree_against_itself(injected: int, alarm: bool) -> None:
    (finding,) = compare(ROOT, ROOT, CASE, factor=4, injected=injected)
    assert not finding.failures
    assert (min(finding.slower) > 4) == alarm, finding


@pytest.mark.usefixtures("_briefly")
def test_the_files_of_a_commit_are_measured(base: Path) -> None:
    """How fast they are is not asked: the working tree may be faster or slower."""
    (finding,) = compare(base, ROOT, CASE, factor=4)
    assert not finding.failures
    assert min(map(len, finding.times.values())) >= gate.LEAST


def test_a_process_that_hangs_is_ended(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "PATIENCE", 1)
    (empty / "subquad" / "__init__.py").write_text("import time; time.sleep(60)")
    with tree.process(empty, {}) as ask, pytest.raises(ChildProcessError, match="the process ended with"):
        ask(*CASE.values())


def test_a_case_that_the_base_lacks_is_new(empty: Path) -> None:
    (finding,) = compare(empty, ROOT, CASE, factor=1.5)
    assert finding.failures.keys() == {"base"}
    assert "selective_scan_step" in finding.failures["base"]
    assert max(finding.slower) < 1.5


def test_a_case_that_the_working_tree_lost_is_an_alarm(empty: Path) -> None:
    (finding,) = compare(ROOT, empty, CASE, factor=1.5)
    assert finding.failures.keys() == {"tree"}
    assert min(finding.slower) > 1.5


def test_a_tree_without_the_package_is_noticed(tmp_path: Path) -> None:
    """Another copy may be installed: it must not be measured in its place."""
    (finding,) = compare(tmp_path, ROOT, CASE, factor=1.5)
    assert "subquad" in finding.failures["base"]


@pytest.mark.usefixtures("_briefly")
def test_every_case_runs_in_the_working_tree() -> None:
    with tree.process(ROOT, {}) as ask:
        for question in gate.cases().values():
            ask(question)


def test_calls_measured_alone_run_once_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call follows a pause and itself, so that it meets neither the threads nor the caches of another one."""
    done: list[str] = []
    monkeypatch.setattr(clock.time, "sleep", lambda _: done.append("pause"))
    calls = {name: lambda name=name: done.append(name) for name in "ab"}
    times = harness.interleave(calls, 2, alone=True)
    assert done == [*"ab", "pause", *(2 * ["pause", "a", "a", "pause", "b", "b"])]
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_a_shorter_call_may_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(clock.time, "sleep", lambda _: None)
    calls = {name: lambda name=name: done.append(name) for name in "ab"}
    harness.interleave(calls, 2, first={"a": lambda: done.append("few")})
    assert done == ["few", "b", *(2 * ["a", "b"])]
