"""Arrays of a Mamba layer, on the device."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from subquad.kernels.selective_scan import Inputs

STATES = 16
OPTIONS = {"delta_softplus": True, "reverse": False}
NO_BFLOAT16 = "bfloat16 needs CuPy 14 and ml_dtypes"


def has_bfloat16() -> bool:
    """Whether CuPy has arrays of it."""
    import cupy

    return int(cupy.__version__.partition(".")[0]) >= 14 and importlib.util.find_spec("ml_dtypes") is not None


def inputs(batch: int, n: int, d: int, d_state: int, dtype: str, *, full: bool = True) -> Inputs:
    """A Mamba layer's arrays: steps around 0.05, A from -1 to -d_state, with D, z and a bias if `full`."""
    import cupy

    storage = importlib.import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    wide = "float64" if dtype == "float64" else "float32"
    rng = cupy.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype="float32").astype(storage)

    A = -cupy.tile(cupy.arange(1, d_state + 1, dtype=wide), (d, 1))
    u, maps = draw(batch, n, d), [draw(batch, n, 1, d_state) for _ in range(2)]
    bias = cupy.full(d, -3, dtype=wide)
    skip, z = (cupy.ones(d, dtype=wide), draw(batch, n, d)) if full else (None, None)
    return Inputs(u, draw(batch, n, d), A, *maps, skip, z, bias, None)
