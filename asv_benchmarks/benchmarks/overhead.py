"""Cost of a call beside its arithmetic: importing, compiling, checking arguments and choosing an implementation."""

import os
import tempfile

from asv_benchmarks import harness, plain


class Import:
    """Time of imports in a fresh interpreter."""

    def timeraw_subquad(self) -> str:
        """Import NumPy and subquad, which loads its parts when they are first used."""
        return "import numpy, subquad"

    def timeraw_first_use(self) -> str:
        """Import subquad and what its calls of attention need, before an array is there."""
        return "import subquad; subquad.attention"

    def timeraw_numpy(self) -> str:
        """Import NumPy alone, for comparison."""
        return "import numpy"


class Compile(harness.PerOperator):
    """The first call in a process, with nothing compiled on disk: tracing, compiling, loading."""

    timeout = 120.0

    def setup(self, backend: str, operator: str) -> None:
        """Import the library and make the arrays, with empty caches of compiled code."""
        self.empty = tempfile.TemporaryDirectory()
        os.environ["NUMBA_CACHE_DIR"] = self.empty.name
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"  # read when CuPy compiles a kernel
        problem = harness.case(operator).random(256)
        self.first = harness.Prepared(harness.target(backend), problem.bind(), tuple(problem.arrays.values()))

    def track_compile_time(self, _backend: str, _operator: str) -> float:
        """Time of the first call, which a process can measure once: no warm-up, no repetition."""
        return harness.seconds(self.first.run)

    track_compile_time.unit = "seconds"  # type: ignore[attr-defined]

    def teardown(self, _backend: str, _operator: str) -> None:
        """Remove the compiled code."""
        self.empty.cleanup()


class Call(harness.PerOperator):
    """A call with four tokens, in which there is next to nothing to compute."""

    number, repeat, rounds, warmup_time = 50, (3, 20, 1.0), 1, 0.05

    def setup(self, backend: str, operator: str) -> None:
        """Compile the call and run it once."""
        self.prepared = harness.prepare(backend, harness.case(operator).random(4))

    def time_overhead(self, _backend: str, _operator: str) -> None:
        """Run one call until its result is complete."""
        self.prepared.run()


class Step(harness.PerOperator):
    """One step of decoding, with one token."""

    number, repeat, rounds, warmup_time = 50, (3, 20, 1.0), 1, 0.05

    @property
    def params(self) -> tuple[list[str], ...]:
        """The libraries, and the operators that have a step."""
        return harness.backends(), harness.stepping()

    def setup(self, backend: str, operator: str) -> None:
        """Prepare a state and the arrays of one token."""
        self.prepared = harness.prepare(backend, harness.one_step(operator))

    def time_step(self, _backend: str, _operator: str) -> None:
        """Run one step, which gives the output and the new state."""
        self.prepared.run()


class BesidePlain:
    """Small calls beside the same formulas in plain calls of the library."""

    param_names = ("backend", "call")
    params = (["numpy", "torch"], ["exact", "favor", "linear", "nystrom", *plain.STEPS])

    def setup(self, backend: str, call: str) -> None:
        """Make the arrays of both sides."""
        harness.target(backend)  # which says n/a where the library cannot be used
        if backend != "numpy" and call in plain.STEPS:
            raise NotImplementedError
        self.pair = plain.pairs(backend)[call]

    def track_ratio(self, _backend: str, _call: str) -> float:
        """Time of our call over that of the formula."""
        return plain.ratio(self.pair)

    track_ratio.unit = "times the formula"  # type: ignore[attr-defined]
