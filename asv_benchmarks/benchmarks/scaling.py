"""How time grows with length: the slope of log time against log n; 1 is linear, 2 is quadratic."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

import subquad

from .attention import SelfAttention
from .common import BACKENDS, Operator, Prepared
from .profiles import PROFILE
from .scan import Scan

ROUNDS = 3


class Exponent(ABC):
    """The least-squares slope over the lengths of the profile."""

    timeout = 600.0

    @abstractmethod
    def operator(self) -> Operator:
        """What is measured at each length, the last of its parameters."""

    def lengths(self, *_params: Any) -> list[int]:
        """As long as the operator goes."""
        return list(PROFILE.slope_lengths)

    def setup(self, backend: str, *params: Any) -> None:
        """A call for each length."""
        operator = self.operator()
        operator.check(*params, 0)
        self.calls = {
            n: Prepared(backend, operator.function(*params, n), operator.arrays(*params, n))
            for n in self.lengths(*params)
        }

    def track_exponent(self, *_params: Any) -> float:
        """The least time of each length: what else the machine does only ever adds."""
        rounds = [[call.seconds() for call in self.calls.values()] for _ in range(ROUNDS)]
        slope, _ = np.polyfit(np.log(list(self.calls)), np.log(np.min(rounds, axis=0)), 1)
        return float(slope)

    track_exponent.unit = "d log time / d log n"  # type: ignore[attr-defined]


class AttentionScaling(Exponent):
    """Each method."""

    params = (BACKENDS, list(subquad.METHODS), [False, True])
    param_names = ("backend", "method", "causal")

    def operator(self) -> Operator:
        """Self-attention."""
        return SelfAttention()

    def lengths(self, method: str, causal: bool) -> list[int]:
        """Exact attention stops early."""
        return [n for n in PROFILE.slope_lengths if method != "exact" or n <= PROFILE.exact_slope_up_to]


class ScanScaling(Exponent):
    """The selective scan."""

    params = (BACKENDS,)
    param_names = ("backend",)

    def operator(self) -> Operator:
        """The scan."""
        return Scan()
