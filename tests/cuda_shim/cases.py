"""Inputs for the CUDA kernels, and the definition of the scan in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from subquad.backend import Call
from subquad.kernels.selective_scan import Inputs
from subquad_cupy.selective_scan import calls, plan

STORED = ("u", "delta", "z", "dy", "B", "C")  # in the data type of the case; the others at least in float32
LOW = {"float16": 2e-3, "bfloat16": 2e-2}  # 2-3 units in the last place of the outputs


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; `constant` names which of B and C do not depend on time."""

    batch: int
    n: int
    d: int
    d_state: int
    groups: int = 1
    constant: str = ""
    full: bool = True  # with D, z, delta_bias, initial_state, softplus and a gradient of the state
    reverse: bool = False
    shared: bool = False  # B and C with a batch axis of 1
    anew: bool = False  # with documents of some ten steps
    dtype: str = "float32"
    decay: float = 1.0

    def __str__(self) -> str:
        words = [f"{self.batch}x{self.n}x{self.d}x{self.d_state}", self.dtype]
        words += [f"groups{self.groups}"] * (self.groups > 1) + [f"constant{self.constant}"] * bool(self.constant)
        words += [name for name in ("reverse", "shared", "anew") if getattr(self, name)] + ["bare"] * (not self.full)
        return "-".join(words)

    @property
    def options(self) -> dict[str, bool]:
        return {"delta_softplus": self.full, "reverse": self.reverse}

    def dtype_of(self, name: str) -> str:
        """The data type of the array `name`."""
        return self.dtype if name in STORED or self.dtype == "float64" else "float32"

    def stored(self, name: str, x: np.ndarray) -> np.ndarray:
        """`x` as a NumPy array in the dtype of the array `name`."""
        dtype = self.dtype_of(name)
        return x.astype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)

    def inputs(self) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
        """Inputs by name, and the gradients of both outputs, in float64 but rounded to the storage type."""
        rng = np.random.default_rng(self.n * 1000 + self.d_state)

        def draw(*shape: int) -> np.ndarray:
            return _rounded(rng.standard_normal(shape), self.dtype)

        rows, states = (self.batch, self.n, self.d), (self.batch, self.d, self.d_state)
        maps = (1 if self.shared else self.batch, self.n, self.groups, self.d_state)
        arrays: dict[str, Any] = dict.fromkeys(Inputs._fields)
        arrays["u"] = draw(*rows)
        arrays["delta"] = _rounded(draw(*rows) - 1, self.dtype) if self.full else abs(draw(*rows)) / 4
        arrays["A"] = _rounded(-np.exp(rng.standard_normal((self.d, self.d_state))) * self.decay, "float32")
        for name in "BC":
            arrays[name] = draw(self.d, self.d_state) if name in self.constant else draw(*maps)
        if self.full:
            arrays |= {"D": draw(self.d), "z": draw(*rows), "delta_bias": draw(self.d) / 4}
            arrays["initial_state"] = draw(*states)
        if self.anew:
            arrays["resets"] = np.random.default_rng(5).random((self.batch, self.n)) < 0.1
        return arrays, draw(*rows), draw(*states) if self.full else None


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float64":
        return x
    bits = {"float32": 22, "float16": 9, "bfloat16": 6}[dtype]
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**bits), exponent - bits)


@functools.cache
def expected(case: Case) -> dict[str, np.ndarray]:
    """Outputs and gradients in float64, by name: y, state, and d<input>."""
    import torch
    import torch_scan

    arrays, dy, dstate = case.inputs()
    leaves = torch_scan.leaves(arrays)
    y, state = torch_scan.scan(leaves, **case.options)
    loss = (y * torch.from_numpy(dy)).sum()
    if dstate is not None:
        loss = loss + (state * torch.from_numpy(dstate)).sum()
    loss.backward()
    found = {"y": y.detach().numpy(), "state": state.detach().numpy()}
    return found | {
        f"d{name}": leaf.grad.numpy() for name, leaf in leaves.items() if leaf is not None and name != "resets"
    }


def solve(case: Case, device: Any, cast: Callable[[str, np.ndarray], Any] | None = None) -> dict[str, Any]:
    """The outputs and gradients that the kernels compute for a case, by the names of `expected`."""
    cast = cast or case.stored
    arrays, dy, dstate = case.inputs()
    resets = arrays.pop("resets")
    inputs = Inputs(*(None if x is None else cast(name, x) for name, x in arrays.items()), resets)
    assert calls.declines(Call("selective_scan", inputs, static=case.options)) is None
    y, state, _ = calls.scan_forward(inputs, **case.options, device=device)
    dy = cast("dy", dy)
    dstate = None if dstate is None else cast("dstate", dstate)
    gradients = calls.scan_backward(dy, dstate, inputs, **case.options, device=device)
    found = {"y": y, "state": state}
    return found | {f"d{name}": getattr(gradients, name) for name, x in arrays.items() if x is not None}


@contextmanager
def small_chunks(steps: int) -> Iterator[None]:
    """Set the minimum length of a chunk to `steps`, so that short sequences are split too."""
    before, plan.MIN_CHUNK = plan.MIN_CHUNK, steps
    try:
        yield
    finally:
        plan.MIN_CHUNK = before


# One of each number of states per lane and of lanes, ragged and aligned, with every option somewhere.
CASES = [
    Case(2, 45, 41, 16),
    Case(1, 1, 3, 1, full=False),
    Case(2, 17, 130, 2, reverse=True),
    Case(2, 33, 10, 3, groups=2, reverse=True),
    Case(2, 21, 12, 7, constant="BC"),
    Case(1, 40, 64, 16, full=False),
    Case(2, 19, 10, 16, constant="B"),
    Case(2, 19, 10, 16, constant="C", reverse=True),
    Case(3, 37, 16, 20, groups=2, shared=True),
    Case(1, 9, 9, 50),
    Case(1, 18, 9, 100),
    Case(1, 11, 12, 256),
    Case(2, 20, 5, 16, dtype="float64"),
    Case(1, 9, 8, 129, dtype="float64"),
    Case(2, 45, 41, 16, anew=True),
    Case(2, 33, 10, 3, groups=2, reverse=True, anew=True),
    Case(2, 21, 12, 7, constant="BC", anew=True),
]
# Longer than the chunks, whose first passes stop early where decay is fast and do not where it is slow.
SPLIT = [
    Case(2, 150, 9, 16, decay=20),
    Case(2, 150, 9, 16, decay=0.01, reverse=True),
    Case(1, 131, 8, 16, constant="BC", decay=3, full=False),
    Case(2, 131, 8, 16, dtype="float64"),
    Case(2, 150, 9, 16, decay=0.01, anew=True),
    Case(1, 131, 8, 16, constant="BC", reverse=True, dtype="float64", anew=True),
]
# Ragged, read number by number, and with whole blocks, read and written by vectors.
LOW_PRECISION = [
    Case(*shape, dtype=dtype) for shape in ((2, 45, 13, 14), (1, 40, 64, 16)) for dtype in ("float16", "bfloat16")
]
SANITIZED = [CASES[0], CASES[2], CASES[4], CASES[5], SPLIT[0], LOW_PRECISION[3]]
