"""Time as a multiple of a floor: the method's matrix products and exponentials alone, by the same library."""

from asv_benchmarks import floor, harness

N, ROUNDS = 4096, 7


class Floor(harness.PerOperator):
    """Forward, not causal, of the methods whose floor is known."""

    timeout = 120.0

    @property
    def params(self) -> tuple[list[str], ...]:
        """The methods that are matrix products and exponentials."""
        return harness.backends(), list(floor.SIZES)

    def setup(self, backend: str, method: str) -> None:
        """The method, and blocks of its products and exponentials."""
        self.calls = floor.calls(backend, method, N)

    def track_floor_ratio(self, _backend: str, _method: str) -> float:
        """1 would be as fast as the arithmetic alone."""
        return floor.multiple(harness.interleave(self.calls, ROUNDS))

    track_floor_ratio.unit = "× the floor"  # type: ignore[attr-defined]
