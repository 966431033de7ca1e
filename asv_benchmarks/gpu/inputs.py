"""Inputs of the scan on the device: the arrays of a Mamba layer."""

from __future__ import annotations

import importlib
import importlib.util

from asv_benchmarks import harness
from subquad.kernels.selective_scan import Inputs

STATES = 16
OPTIONS = {"delta_softplus": True, "reverse": False}
NO_BFLOAT16 = "bfloat16 needs CuPy 14 and ml_dtypes"


def has_bfloat16() -> bool:
    """Whether CuPy has arrays of bfloat16."""
    import cupy

    return int(cupy.__version__.partition(".")[0]) >= 14 and importlib.util.find_spec("ml_dtypes") is not None


def inputs(batch: int, n: int, d: int, d_state: int, dtype: str) -> Inputs:
    """The arrays of a Mamba layer with D, z and a bias; B and C have one group."""
    import cupy

    storage = importlib.import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    layer = harness.mamba(cupy, (batch, n, d), d_state, storage)
    return Inputs(**layer | {name: layer[name][:, :, None] for name in "BC"}, initial_state=None)
