"""Error of each operator against its definition, on the activations of a trained model that come with the package."""

from asv_benchmarks import harness
from subquad.cli.definitions import relative_error
from subquad.cli.inputs import read_sample


class Accuracy(harness.PerOperator):
    """Relative Frobenius error against the definition in float64: exact attention, or the recurrence of a scan."""

    timeout = 120.0

    def setup(self, backend: str, operator: str) -> None:
        """Prepare a call and the output that it should return."""
        case = harness.case(operator)
        problem = case.real(read_sample())
        self.prepared, self.reference = harness.prepare(backend, problem), case.reference(problem)

    def track_error(self, _backend: str, _operator: str) -> float:
        """The relative error: 0 is exact, 1 is as good as the answer 0."""
        return relative_error(self.prepared.bench.to_numpy(self.prepared.run()), self.reference)

    track_error.unit = "relative error"  # type: ignore[attr-defined]
