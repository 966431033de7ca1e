"""Fixtures that every test may use."""

from __future__ import annotations

import os

# programs here run once: what XLA saves by optimising them is less than what it spends
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import contextlib

import numpy as np
import pytest
from rows.libraries import EAGER, LIBRARIES, Jax, Library


def pytest_configure() -> None:
    """One thread: the arrays are small, and workers that spin on each other's cores take ten times as long."""
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    """Every row of the table of libraries."""
    return request.param


@pytest.fixture(params=EAGER)
def eager(request: pytest.FixtureRequest) -> Library:
    """Every library once."""
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    """Seed fixed: a failure can be seen again."""
    return np.random.default_rng(20240917)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows, so that short sequences are cut into several, the last one ragged."""
    monkeypatch.setattr("subquad.core.block_loop.BLOCK_ELEMENTS", 1)


@pytest.fixture
def jax_library() -> Jax:
    """JAX, or a skip."""
    pytest.importorskip("jax")
    return Jax()
