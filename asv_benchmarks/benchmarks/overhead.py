"""What a call costs beside its arithmetic: importing, compiling, and the way through the front door."""

import os
import tempfile

from asv_benchmarks import harness


class Import:
    """In a fresh interpreter."""

    def timeraw_subquad(self) -> str:
        """With NumPy, which it needs."""
        return "import subquad"

    def timeraw_numpy(self) -> str:
        """What NumPy takes of that."""
        return "import numpy"


class Compile(harness.PerOperator):
    """The first call in a process, with nothing compiled on disk: tracing, compiling, loading."""

    timeout = 120.0

    def setup(self, backend: str, operator: str) -> None:
        """Import the library, make the arrays."""
        self.empty = tempfile.TemporaryDirectory()
        os.environ["NUMBA_CACHE_DIR"] = self.empty.name  # read when it is first imported
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"  # read when a kernel is compiled
        problem = harness.case(operator).random(256)
        self.first = harness.Prepared(harness.target(backend), problem.bind(), tuple(problem.arrays.values()))

    def track_compile_time(self, _backend: str, _operator: str) -> float:
        """It can be measured once in a process, so neither warmed up nor repeated."""
        return harness.seconds(self.first.run)

    track_compile_time.unit = "seconds"  # type: ignore[attr-defined]

    def teardown(self, _backend: str, _operator: str) -> None:
        """Remove what was compiled."""
        self.empty.cleanup()


class Call(harness.PerOperator):
    """Four tokens: there is next to nothing to compute."""

    number, repeat, rounds, warmup_time = 50, (3, 20, 1.0), 1, 0.05

    def setup(self, backend: str, operator: str) -> None:
        """Compile and run once."""
        self.prepared = harness.prepare(backend, harness.case(operator).random(4))

    def time_overhead(self, _backend: str, _operator: str) -> None:
        """From idle device to finished result."""
        self.prepared.run()


class Step(harness.PerOperator):
    """One token of decoding."""

    number, repeat, rounds, warmup_time = 50, (3, 20, 1.0), 1, 0.05

    @property
    def params(self) -> tuple[list[str], ...]:
        """The operators that have a step."""
        return harness.backends(), harness.stepping()

    def setup(self, backend: str, operator: str) -> None:
        """A state, and the arrays of one token."""
        self.prepared = harness.prepare(backend, harness.one_step(operator))

    def time_step(self, _backend: str, _operator: str) -> None:
        """Output and new state."""
        self.prepared.run()
