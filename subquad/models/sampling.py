"""The choice of the next token from logits, on the host in float64, so that every library draws equal tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from subquad.core.checks import check_count, check_number
from subquad.models.source import Host


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen: the likeliest at temperature 0, otherwise at random from p ∝ exp(logits / temperature).

    Attributes
    ----------
    temperature : float
        0, or the divisor of the logits.
    top_k : int or None
        Only the k likeliest tokens take part; of equal ones, those of lower number.
    top_p : float or None
        Of these, only the fewest, from the likeliest on, whose probabilities sum to top_p or more.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        temperature = check_number("temperature", self.temperature)
        if temperature < 0:
            msg = f"temperature must be 0 or more, got {self.temperature}"
            raise ValueError(msg)
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None and not 0 < check_number("top_p", self.top_p) <= 1:
            msg = f"top_p must be above 0 and at most 1, got {self.top_p}"
            raise ValueError(msg)
        for name in ("top_k", "top_p"):
            if temperature == 0 and getattr(self, name) is not None:
                msg = (
                    f"{name} is {getattr(self, name)}, but temperature is 0, which takes the likeliest token: "
                    f"give a temperature too, such as 1.0"
                )
                raise ValueError(msg)

    def choose(self, logits: Host, rng: np.random.Generator) -> int:
        """A token by logits (vocab_size,); one random number is drawn, unless temperature is 0."""
        if not np.isfinite(np.max(logits)):  # NaN, +∞, or −∞ alone: no token is the likeliest; one at −∞ never comes
            msg = "the logits hold NaN or infinity: the weights or the state are not finite"
            raise ValueError(msg)
        if self.temperature == 0:
            return int(np.argmax(logits))
        p = self.probabilities(logits)
        edges = np.cumsum(p)
        chosen = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
        return min(chosen, int(np.flatnonzero(p)[-1]))  # u edges[-1] may round to edges[-1]

    def probabilities(self, logits: Host) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The probability of each token, in float64, 0 for those that take no part."""
        below = logits.astype(np.float64)
        below -= np.max(below)
        with np.errstate(over="ignore"):  # by a tiny temperature to −∞, whose exponential is 0
            p = np.exp(below / self.temperature)
        if self.top_k is not None and self.top_k < p.size:
            _keep_largest(p, self.top_k)
        p /= np.sum(p)
        if self.top_p is not None:
            _keep_mass(p, self.top_p)
            p /= np.sum(p)
        return p


def _keep_largest(p: Host, k: int) -> None:
    """Set all but the k largest to 0, in place; of equal ones, those of lower number stay."""
    least = np.partition(p, p.size - k)[p.size - k]
    ties = np.flatnonzero(p == least)
    p[p < least] = 0.0
    p[ties[k - np.count_nonzero(p > least) :]] = 0.0


def _keep_mass(p: Host, mass: float) -> None:
    """Set all but the fewest of the largest whose sum is `mass` or more to 0, in place; p sums to 1."""
    # all below (1 − mass) / size sum to less than 1 − mass, so that none of them is needed: few are left to sort
    some = np.flatnonzero(p >= (1 - mass) / p.size)
    order = some[np.argsort(-p[some], kind="stable")]
    before = np.cumsum(p[order]) - p[order]  # the mass of all that are likelier
    kept = order[before < mass]
    values = p[kept]
    p[:] = 0.0
    p[kept] = values
