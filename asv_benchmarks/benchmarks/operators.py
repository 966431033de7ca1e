"""Every registered operator with its default options: time and memory, of a call and of its gradient."""

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
