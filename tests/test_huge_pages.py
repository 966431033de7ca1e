"""Large outputs in memory of PyTorch and XLA come in huge pages, where the system has them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from pieces import piece

import subquad
from subquad_numpy.runtime import huge_pages
from subquad_numpy.runtime.huge_pages import HUGE, LARGE, PAGE

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
N, D_V = 1 << 18, 64  # an output of 64 MiB, more than malloc keeps: every call touches it first
KIND = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


def by_address() -> Callable[..., int]:
    """The function of (address of madvise, first, size) that XLA's handler calls."""
    pytest.importorskip("jax")
    from subquad_jax.handler import ask_by

    def ask(madvise: int, first: int, size: int) -> int:
        ask_by(madvise, first, size)
        return 0

    return piece(ask)


@pytest.fixture(params=["Python", "compiled code"])
def asked(request: Any, monkeypatch: Any) -> Iterator[tuple[Callable[[int, int], None], list[tuple[int, ...]]]]:
    """How to ask, and the calls that the system sees."""
    seen: list[tuple[int, ...]] = []

    @KIND
    def system(*given: int) -> int:
        seen.append(given)
        return 0

    if request.param == "Python":
        monkeypatch.setattr(huge_pages, "from_python", lambda: system)
        yield huge_pages.ask, seen
    else:
        address, compiled = ctypes.cast(system, ctypes.c_void_p).value, by_address()
        yield lambda first, size: compiled(address, first, size), seen


def test_asks_for_large_outputs_alone(asked: Any) -> None:
    ask, seen = asked
    ask(8 * PAGE, LARGE - 1)
    assert seen == []
    ask(8 * PAGE, LARGE)
    assert seen == [(8 * PAGE, LARGE, HUGE)]


def test_asks_for_pages_of_nothing_else(asked: Any) -> None:
    ask, seen = asked
    ask(8 * PAGE + 16, LARGE + PAGE)
    ask(8 * PAGE - 16, LARGE + 32 + PAGE - 17)
    assert seen == [(9 * PAGE, LARGE, HUGE), (8 * PAGE, LARGE, HUGE)]


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_a_large_output_costs_few_faults(library: str) -> None:
    if not ENABLED.exists() or "[never]" in ENABLED.read_text():
        pytest.skip("this system has no huge pages")
    import resource

    run = _run(library)
    for _ in range(2):
        run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 4 * N * D_V / mmap.PAGESIZE / 4


def _run(library: str) -> Callable[[], Any]:
    """A call whose work is little beside its output."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in ((N, 1), (1, 1), (1, D_V))]
    if library == "torch":
        torch = pytest.importorskip("torch")
        tensors = [torch.from_numpy(x) for x in arrays]
        return lambda: subquad.attention(*tensors, "linear")
    jax = pytest.importorskip("jax")
    given = [jax.numpy.asarray(x) for x in arrays]
    attend = jax.jit(lambda *arrays: subquad.attention(*arrays, "linear"))
    return lambda: attend(*given).block_until_ready()


def test_a_system_without_the_hint_is_not_asked(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    huge_pages.madvise.cache_clear()
    huge_pages.from_python.cache_clear()
    try:
        assert huge_pages.madvise() == 0
        huge_pages.ask(8 * PAGE, LARGE)  # which a system would refuse, were it asked
    finally:
        huge_pages.madvise.cache_clear()
        huge_pages.from_python.cache_clear()
