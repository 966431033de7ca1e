"""Time of a method as a multiple of a floor: its matrix products and exponentials alone, by the array library."""

from asv_benchmarks import floor, harness

N, ROUNDS = 4096, 7


class Floor(harness.PerOperator):
    """The methods whose floor is known: the forward pass, and where the name ends so with the gradient."""

    timeout = 120.0

    @property
    def params(self) -> tuple[list[str], ...]:
        """The libraries, and the methods in `asv_benchmarks.floor.WORK`."""
        return harness.backends(), list(floor.WORK)

    def setup(self, backend: str, method: str) -> None:
        """Prepare the method, and blocks of its products and exponentials."""
        self.calls = floor.calls(backend, method, N)

    def track_floor_ratio(self, _backend: str, _method: str) -> float:
        """Time divided by the floor; 1 is as fast as the arithmetic alone."""
        return floor.multiple(floor.measure(self.calls, ROUNDS))

    track_floor_ratio.unit = "× the floor"  # type: ignore[attr-defined]
