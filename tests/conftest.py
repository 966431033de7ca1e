"""Fixtures for all tests."""

from __future__ import annotations

import os

# programs here run once: what XLA saves by optimising them is less than what it spends, two thirds of it on building
# the code of fusions out of MLIR
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)

import contextlib
import gc

import numpy as np
import pytest
from rows.libraries import EAGER, LIBRARIES, Jax, Library
from warm import compile_share


def pytest_configure() -> None:
    """Run libraries on one thread: arrays are small, and threads of parallel workers would compete for the cores."""
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)
    compile_share()


def pytest_collection_finish() -> None:
    """Spare the collector of garbage what lives to the end: thousands of tests, and the modules of large libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    """Each row of the table of libraries, in turn."""
    return request.param


@pytest.fixture(params=EAGER)
def eager(request: pytest.FixtureRequest) -> Library:
    """Each library, once, in turn."""
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    """A random generator with a fixed seed, so that a failure can be reproduced."""
    return np.random.default_rng(20240917)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set blocks to 64 rows, so that short sequences are cut into several blocks, the last one ragged."""
    monkeypatch.setattr("subquad.core.block_loop.BLOCK_ELEMENTS", 1)


@pytest.fixture
def jax_library() -> Jax:
    """The row of JAX; the test is skipped if JAX is not installed."""
    pytest.importorskip("jax")
    return Jax()
