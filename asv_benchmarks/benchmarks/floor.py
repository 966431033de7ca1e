"""Time as a multiple of a floor: the method's matrix products and exponentials alone, by the same library.

Per head and side (queries, keys) FAVOR+ and Nyström attention take two products and one exponential of n × m. The floor
does them block by block in cache, in the same run.
"""

import time
from typing import Any

from array_api_compat import array_namespace

from .attention import SelfAttention
from .common import BACKENDS, HEADS, D, Prepared, draw_normal

N, ROWS = 4096, 1024
FEATURES = {"favor": 256, "nystrom": 64}  # m, the methods' defaults
ROUNDS = 7


class Floor:
    """Forward, not causal."""

    timeout = 120.0
    params = (BACKENDS, list(FEATURES))
    param_names = ("backend", "method")

    def setup(self, backend: str, method: str) -> None:
        """The method, a product of one block, and an exponential of one block."""
        params = (method, False, N)
        operator, m = SelfAttention(), FEATURES[method]
        self.ours = Prepared(backend, operator.function(*params), operator.arrays(*params))
        self.product = Prepared(backend, _product, draw_normal((ROWS, D), (D, m)))
        self.exponential = Prepared(backend, _exponential, draw_normal((ROWS, m)))

    def track_floor_ratio(self, _backend: str, _method: str) -> float:
        """1 would be as fast as the arithmetic alone."""
        rounds = [(self.ours.seconds(), self.floor_seconds()) for _ in range(ROUNDS)]
        ours, floor = map(min, zip(*rounds, strict=True))
        return ours / floor

    def floor_seconds(self) -> float:
        """All blocks, one after the other."""
        synchronize = self.product.bench.synchronize
        start = time.perf_counter()
        for _ in range(HEADS * N // ROWS):
            for _ in range(2):  # the sides
                product = self.product.call(*self.product.args)
                exponential = self.exponential.call(*self.exponential.args)
                product = self.product.call(*self.product.args)
        synchronize(product, exponential)
        return time.perf_counter() - start

    track_floor_ratio.unit = "× the floor"  # type: ignore[attr-defined]


def _product(x: Any, w: Any) -> Any:
    return x @ w


def _exponential(x: Any) -> Any:
    return array_namespace(x).exp(x)
