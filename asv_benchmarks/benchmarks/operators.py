"""Every registered operator with its default options: time and memory, of a call and of its gradient."""

from typing import Any

from asv_benchmarks import harness

from .profiles import PROFILE


class Operator(harness.PerOperator):
    """One call, from idle device to finished result; with `gradient`, also the gradients of ½‖out‖² by all arguments.

    A library that has no gradients gives n/a.
    """

    timeout = 120.0
    number = 1  # calls between two looks at the clock; they take milliseconds
    repeat = (3, 20, 2.0)  # at least, at most, seconds
    rounds = 1
    warmup_time = 0.1
    param_names = ("backend", "operator", "gradient", "n")

    @property
    def params(self) -> tuple[list[Any], ...]:
        """Those of every operator, and whether there is a gradient, and of what length the sequence is."""
        return *super().params, [False, True], list(PROFILE.lengths)

    def setup(self, backend: str, operator: str, gradient: bool, n: int) -> None:
        """Make the arrays on their device, compile, and run once."""
        case = harness.case(operator)
        if n > PROFILE.longest(case, gradient=gradient):
            msg = f"{operator} is not measured at n = {n}: it would take too long"
            raise NotImplementedError(msg)
        self.prepared = harness.prepare(backend, case.random(n), gradient=gradient)

    def time_call(self, *_params: Any) -> None:
        """One call."""
        self.prepared.run()

    def track_extra_memory(self, *_params: Any) -> float:
        """The most held at one moment, beyond inputs and results."""
        peak = self.prepared.extra_memory()
        return float("nan") if peak is None else peak

    track_extra_memory.unit = "bytes"  # type: ignore[attr-defined]
