"""Every registered operator with its default options: time and memory, of a call and of its gradient."""

import importlib
import statistics
from typing import Any

from asv_benchmarks import harness

from .profiles import PROFILE


class Operator(harness.PerOperator):
    """One call, until its result is complete; with `gradient`, also the gradients of ½‖out‖² by all arguments.

    A library without gradients gives n/a.
    """

    timeout = 120.0
    number = 1  # calls in one sample: 1, since a call takes milliseconds
    repeat = (3, 20, 2.0)  # min samples, max samples, max seconds
    rounds = 1
    warmup_time = 0.1
    param_names = ("backend", "operator", "gradient", "n")

    @property
    def params(self) -> tuple[list[Any], ...]:
        """The libraries, the operators, with or without gradient, and the lengths of the profile."""
        return *super().params, [False, True], list(PROFILE.lengths)

    def setup(self, backend: str, operator: str, gradient: bool, n: int) -> None:
        """Make the arrays on their device, compile the call, and run it once."""
        case = harness.case(operator)
        if n > PROFILE.longest(case, gradient=gradient):
            msg = f"{operator} is not measured at n = {n}: it would take too long"
            raise NotImplementedError(msg)
        self.prepared = harness.prepare(backend, case.random(n), gradient=gradient)

    def time_call(self, *_params: Any) -> None:
        """Run one call."""
        self.prepared.run()

    def track_extra_memory(self, *_params: Any) -> float:
        """Peak memory beyond inputs and results; NaN if the library cannot tell."""
        peak = self.prepared.extra_memory()
        return float("nan") if peak is None else peak

    track_extra_memory.unit = "bytes"  # type: ignore[attr-defined]


class HalfPrecision(harness.PerOperator):
    """One call on arrays of half precision, beside the same call in float32."""

    timeout = 120.0
    param_names = ("backend", "operator", "dtype")

    @property
    def params(self) -> tuple[list[Any], ...]:
        """The libraries, the operators, and the dtypes."""
        return *super().params, ["bfloat16", "float16"]

    def setup(self, backend: str, operator: str, dtype: str) -> None:
        """Make the arrays in both dtypes, and run both calls once."""
        problem = harness.case(operator).random(PROFILE.lengths[0])
        if backend.startswith("numpy") and dtype == "bfloat16":
            try:
                importlib.import_module("ml_dtypes")  # gives NumPy the dtype
            except ImportError as error:
                raise NotImplementedError(str(error)) from error
        self.single, self.half = (harness.prepare(backend, problem, dtype=x) for x in ("float32", dtype))

    def track_time_ratio(self, *_params: Any) -> float:
        """Time divided by that in float32, medians of calls that take turns."""
        times = harness.interleave({"half": self.half.run, "single": self.single.run}, 9)
        return statistics.median(times["half"]) / statistics.median(times["single"])

    track_time_ratio.unit = "× float32"  # type: ignore[attr-defined]

    def track_extra_memory(self, *_params: Any) -> float:
        """Peak memory beyond inputs and results; NaN if the library cannot tell."""
        peak = self.half.extra_memory()
        return float("nan") if peak is None else peak

    track_extra_memory.unit = "bytes"  # type: ignore[attr-defined]
