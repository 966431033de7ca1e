"""What a call costs beside its arithmetic: importing, compiling, and the way through the front door."""

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import subquad

from .attention import SelfAttention
from .common import BACKENDS, Operator, Prepared, draw_normal, find
from .scan import Scan

OPERATORS = [*subquad.METHODS, "selective_scan"]


class Import:
    """In a fresh interpreter."""

    def timeraw_subquad(self) -> str:
        """With NumPy, which it needs."""
        return "import subquad"

    def timeraw_numpy(self) -> str:
        """What NumPy takes of that."""
        return "import numpy"


class Compile:
    """The first call in a process, with nothing compiled on disk: tracing, compiling, loading."""

    timeout = 120.0
    params = (BACKENDS, ["favor", "selective_scan"])  # seconds each
    param_names = ("backend", "operator")

    def setup(self, backend: str, operator: str) -> None:
        """Import the library, make the arrays."""
        self.empty = tempfile.TemporaryDirectory()
        os.environ["NUMBA_CACHE_DIR"] = self.empty.name  # read when it is first imported
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"  # read when a kernel is compiled
        bench, device = find(backend)
        function, arrays = _small(operator, n=256)
        args = tuple(bench.asarray(x, device=device) for x in arrays)
        self.first = lambda: bench.synchronize(bench.compile(function)(*args))

    def track_compile_time(self, _backend: str, _operator: str) -> float:
        """It can be measured once in a process, so neither warmed up nor repeated."""
        start = time.perf_counter()
        self.first()
        return time.perf_counter() - start

    track_compile_time.unit = "seconds"  # type: ignore[attr-defined]

    def teardown(self, _backend: str, _operator: str) -> None:
        """Remove what was compiled."""
        self.empty.cleanup()


class PerCall:
    """Four tokens: there is next to nothing to compute."""

    params = (BACKENDS, OPERATORS)
    param_names = ("backend", "operator")
    number, repeat, rounds, warmup_time = 50, (3, 20, 1.0), 1, 0.05

    def setup(self, backend: str, operator: str) -> None:
        """Compile and run once."""
        self.prepared = Prepared(backend, *_small(operator, n=4))

    def time_overhead(self, _backend: str, _operator: str) -> None:
        """From idle device to finished result."""
        self.prepared.run()


class Step:
    """One token of decoding, as a Mamba layer takes it."""

    params = (BACKENDS,)
    param_names = ("backend",)
    number, repeat, rounds, warmup_time = 50, (3, 20, 1.0), 1, 0.05

    def setup(self, backend: str) -> None:
        """The arrays of the scan at one moment, and a state."""
        u, delta, A, B, C, D, z, bias = Scan().arrays(1)
        (state,) = draw_normal((1, *A.shape))
        arrays = (state, u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], bias)
        self.prepared = Prepared(backend, _step, arrays)

    def time_step(self, _backend: str) -> None:
        """Output and new state."""
        self.prepared.run()


def _step(state: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> Any:
    return subquad.selective_scan_step(state, u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)


def _small(name: str, n: int) -> tuple[Callable[..., Any], tuple[np.ndarray, ...]]:
    operator: Operator = Scan() if name == "selective_scan" else SelfAttention()
    params = (n,) if name == "selective_scan" else (name, False, n)
    return operator.function(*params), operator.arrays(*params)
