"""The table of forms of the selective scan: which inputs are given, and their shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import subquad
from rows import definitions

Array = np.ndarray
D, D_STATE = 6, 3  # channels, states


@dataclass(frozen=True)
class Scan:
    """One form of the scan. `maps` is the form of B and C: "steps", "groups", "constant" or "mixed"."""

    name: str
    maps: str = "steps"
    batch: tuple[int, ...] = (2,)
    complex_: bool = False
    extras: tuple[str, ...] = ()  # of D, z, delta_bias, initial_state
    softplus: bool = False
    reverse: bool = False

    def draw(self, n: int, seed: int = 11) -> dict[str, Array]:
        """Draw inputs by name, float64; step sizes from 0.05 to 1 and rates from 0.2 to 2 give memories of 1 to 100 steps."""
        rng = np.random.default_rng(seed)
        shape = (*self.batch, n, D)

        def normal(*shape: int) -> Array:
            x = rng.standard_normal(shape)
            return x + 1j * rng.standard_normal(shape) if self.complex_ else x

        delta = rng.uniform(0.05, 1, shape)
        A = -rng.uniform(0.2, 2, (D, D_STATE)) + (3j * rng.standard_normal((D, D_STATE)) if self.complex_ else 0)
        drawn = {"u": rng.standard_normal(shape), "delta": np.log(np.expm1(delta)) if self.softplus else delta, "A": A}
        shapes = {"steps": (*self.batch, n, D_STATE), "groups": (*self.batch, n, 2, D_STATE), "constant": (D, D_STATE)}
        for name in ("B", "C"):
            drawn[name] = normal(
                *shapes[("constant" if name == "B" else "steps") if self.maps == "mixed" else self.maps]
            )
        drawn["D"], drawn["delta_bias"] = rng.standard_normal(D), rng.uniform(-0.04, 0.5, D)
        drawn["z"], drawn["initial_state"] = rng.standard_normal(shape), normal(*self.batch, D, D_STATE)
        needed = ("u", "delta", "A", "B", "C", *self.extras)
        return {name: drawn[name] for name in needed}

    def call(self, *, return_state: bool = True, implementation: str = "auto") -> Callable[[dict[str, Any]], Any]:
        """`selective_scan` as a function of the dictionary of inputs."""

        def scan(given: dict[str, Any]) -> Any:
            return subquad.selective_scan(
                *(given.get(name) for name in ("u", "delta", "A", "B", "C", "D")),
                **{name: given.get(name) for name in ("z", "delta_bias", "initial_state")},
                delta_softplus=self.softplus,
                reverse=self.reverse,
                return_state=return_state,
                implementation=implementation,
            )

        return scan

    def reference(self, drawn: dict[str, Array]) -> tuple[Array, Array]:
        """The outputs by the loop over time, for every item of the batch."""
        y = np.zeros(drawn["u"].shape)
        state = np.zeros((*self.batch, D, D_STATE), dtype=drawn["A"].dtype)
        for index in np.ndindex(self.batch):
            mine = {name: x if is_shared(name, x) else x[index] for name, x in drawn.items()}
            positional = [mine.pop(name) for name in ("u", "delta", "A", "B", "C")]
            y[index], state[index] = definitions.selective_scan(
                *positional, mine.pop("D", None), **mine, delta_softplus=self.softplus, reverse=self.reverse
            )
        return y, state


def is_shared(name: str, x: Array) -> bool:
    """Whether an input has no batch axes, as parameters and constant maps."""
    return name in ("A", "D", "delta_bias") or (name in ("B", "C") and x.shape == (D, D_STATE))


SCANS = [
    Scan("plain"),
    Scan("gated", extras=("D", "z", "delta_bias"), softplus=True),
    Scan("state", extras=("initial_state", "D")),
    Scan("groups", maps="groups", extras=("initial_state", "delta_bias"), softplus=True),
    Scan("constant", maps="constant", extras=("z",)),
    Scan("mixed", maps="mixed", batch=(2, 3), extras=("delta_bias",)),
    Scan("complex", complex_=True, extras=("D", "z", "initial_state")),
    Scan("complex-groups", maps="groups", complex_=True, extras=("initial_state",), softplus=True),
    Scan("complex-constant", maps="constant", complex_=True),
    Scan("reverse", extras=("initial_state", "z", "D"), reverse=True),
    Scan("reverse-complex", complex_=True, maps="groups", extras=("initial_state",), reverse=True),
    Scan("one-sequence", batch=(), extras=("D", "initial_state")),
]


def scans(*names: str) -> Any:
    """`pytest.mark.parametrize` over the table, or the rows named."""
    table = [scan for scan in SCANS if not names or scan.name in names]
    return pytest.mark.parametrize("scan", [pytest.param(scan, id=scan.name) for scan in table])
