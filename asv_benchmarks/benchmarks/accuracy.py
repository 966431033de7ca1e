"""How far each method is from exact attention, on the activations of a trained model that come with the package."""

from collections.abc import Callable
from typing import Any

import numpy as np

import subquad
from subquad.cli import definitions
from subquad.cli.inputs import read_sample

from .attention import check
from .common import BACKENDS, Operator


class Accuracy(Operator):
    """Relative Frobenius error against the definition in float64."""

    params = (BACKENDS, list(subquad.METHODS), [False, True])
    param_names = ("backend", "method", "causal")

    def check(self, method: str, causal: bool) -> None:
        """A causal form."""
        check(method, causal)

    def function(self, method: str, causal: bool) -> Callable[..., Any]:
        """A call of `subquad.attention` with the method's default options and seed."""
        return lambda q, k, v: subquad.attention(q, k, v, method, causal=causal)

    def arrays(self, method: str, causal: bool) -> tuple[np.ndarray, ...]:
        """q, k and v of one layer."""
        sample = read_sample()
        return sample.q, sample.k, sample.v

    def track_error(self, _backend: str, method: str, causal: bool) -> float:
        """0 is exact, 1 is as good as answering 0."""
        prepared = self.prepared
        out = prepared.bench.to_numpy(prepared.call(*prepared.args))
        return definitions.relative_error(out, definitions.attention(*self.arrays(method, causal), causal=causal))

    track_error.unit = "relative error"  # type: ignore[attr-defined]
