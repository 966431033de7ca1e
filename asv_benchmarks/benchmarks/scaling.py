"""Growth of time with length: the slope of log time against log n; 1 is linear, 2 is quadratic."""

from typing import Any

import numpy as np

from asv_benchmarks import harness

from .profiles import PROFILE

ROUNDS = 3


class Scaling(harness.PerOperator):
    """Least-squares slope over the lengths of the profile."""

    timeout = 600.0

    def setup(self, backend: str, operator: str) -> None:
        """Prepare a call for each length."""
        case = harness.case(operator)
        self.calls = {n: harness.prepare(backend, case.random(n)).run for n in PROFILE.slope(case)}

    def track_exponent(self, *_params: Any) -> float:
        """The slope of the minimum times: other load on the machine can only add to a time."""
        times = harness.interleave(self.calls, ROUNDS)
        slope, _ = np.polyfit(np.log(list(times)), np.log([min(found) for found in times.values()]), 1)
        return float(slope)

    track_exponent.unit = "d log time / d log n"  # type: ignore[attr-defined]
