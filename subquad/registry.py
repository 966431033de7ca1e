"""Stand-in for the registry of operators, until the real one arrives: METHODS and SCANS as rows."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from subquad.attention import ALIASES, METHODS, find_method
from subquad.ssm import linear_scan, selective_scan, selective_scan_step

__all__ = ["ALIASES", "METHODS", "SCANS", "MethodRow", "ScanRow", "find_method", "method_row", "register"]

Arrays = Mapping[str, Any]
ROWS: dict[str, MethodRow] = {}
SCANS: dict[str, ScanRow] = {}


@dataclass(frozen=True)
class MethodRow:
    """A method: `size` is the option that says how large it is, `defaults` the options that compare shows."""

    name: str
    cls: Any
    aliases: tuple[str, ...]
    cost: str
    size: str | None
    defaults: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class ScanRow:
    """A scan and what draws its inputs."""

    name: str
    function: Callable[..., Any]
    cost: str
    state: Any
    draw: Callable[[Any, int], tuple[dict[str, np.ndarray], dict[str, Any]]]
    step: Callable[..., Any] | None = None
    drive: Callable[..., Any] | None = None
    definition: Callable[..., Any] | None = None

    def call(self, arrays: Arrays, options: Arrays) -> Any:
        """The function of arrays by name."""
        first = [x.name for x in inspect.signature(self.function).parameters.values() if x.kind == x.POSITIONAL_ONLY]
        rest = {name: x for name, x in arrays.items() if name not in first}
        return self.function(*(arrays[name] for name in first if name in arrays), **rest, **options)

    def activations(self, q: Any, k: Any, v: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Inputs made of activations; by default drawn ones of as many tokens."""
        return self.drive(q, k, v) if self.drive else self.draw(np.random.default_rng(0), q.shape[-2])

    @property
    def reference(self) -> Callable[..., Any] | None:
        """The definition in float64."""
        return self.definition


def register(name: str, **row: Any) -> Callable[[Any], Any]:
    """Make a class a method."""

    def add(cls: Any) -> Any:
        METHODS[name] = cls
        sys.modules["subquad.attention"].OPTIONS[cls] = tuple(f.name for f in dataclasses.fields(cls))
        ROWS[name] = MethodRow(name, cls, **{"aliases": (), "size": None, "defaults": ({},), **row})
        return cls

    return add


def register_scan(name: str, **row: Any) -> Callable[[Any], Any]:
    """Make a function a scan."""

    def add(function: Any) -> Any:
        SCANS[name] = ScanRow(name, function, **row)
        return function

    return add


def method_row(name: str) -> MethodRow:
    """The row of a method."""
    return ROWS[name]


def _draw_selective(rng: Any, n: int) -> Any:
    d, states = 256, 16
    arrays = {
        "u": rng.standard_normal((1, n, d)),
        "delta": rng.standard_normal((1, n, d)),
        "A": np.tile(-np.arange(1.0, states + 1), (d, 1)),
        "B": rng.standard_normal((1, n, states)),
        "C": rng.standard_normal((1, n, states)),
        "D": np.ones(d),
        "z": rng.standard_normal((1, n, d)),
        "delta_bias": np.full(d, np.log(np.expm1(0.01))),
    }
    return arrays, {"delta_softplus": True}


def _drive_selective(q: Any, k: Any, v: Any) -> Any:
    if q.ndim > 2:
        q = q[..., :: q.shape[-3] // k.shape[-3], :, :]
    d, d_v = k.shape[-1], v.shape[-1]
    states = min(16, d)
    delta = k @ (np.random.default_rng(0).standard_normal((d, d_v)) / d**0.5)
    A, bias = np.tile(-np.arange(1.0, states + 1), (d_v, 1)), np.full(d_v, np.log(np.expm1(0.05)))
    arrays = {"u": v, "delta": delta, "A": A, "B": k[..., :states], "C": q[..., :states]}
    return arrays | {"D": np.ones(d_v), "delta_bias": bias}, {"delta_softplus": True}


def _define_selective(arrays: Any, _options: Any) -> Any:
    u, delta, A, B, C, D, bias = (np.asarray(x, dtype=np.float64) for x in arrays.values())
    delta = np.logaddexp(0.0, delta + bias)
    h, y = np.zeros((*u.shape[:-2], *A.shape)), np.empty_like(u)
    for t in range(u.shape[-2]):
        step = delta[..., t, :, None]
        h = np.exp(step * A) * h + step * B[..., t, None, :] * u[..., t, :, None]
        y[..., t, :] = np.sum(C[..., t, None, :] * h, axis=-1) + D * u[..., t, :]
    return y


def _draw_linear(rng: Any, n: int) -> Any:
    return {"a": rng.uniform(0.8, 1, (1, n, 256)), "b": rng.standard_normal((1, n, 256))}, {}


for _name, _causal, _state in (
    ("exact", True, None),
    ("favor", True, {}),
    ("linear", True, {}),
    ("nystrom", "its landmarks are means over the whole sequence", {}),
):
    METHODS[_name].causal, METHODS[_name].state = _causal, _state  # type: ignore[attr-defined]
register("exact", cost="n n_kv (d + d_v)")(METHODS["exact"])
register("favor", cost="n m (d + d_v)", size="num_features", defaults=({"num_features": 64}, {"num_features": 256}))(
    METHODS["favor"]
)
register("linear", cost="n d d_v")(METHODS["linear"])
register(
    "nystrom", cost="n m (d + d_v)", size="num_landmarks", defaults=({"num_landmarks": 32}, {"num_landmarks": 64})
)(METHODS["nystrom"])
register_scan("linear_scan", cost="n d", state={}, draw=_draw_linear)(linear_scan)
register_scan(
    "selective_scan", cost="n d d_state", state={}, draw=_draw_selective, step=selective_scan_step,
    drive=_drive_selective, definition=_define_selective,
)(selective_scan)  # fmt: skip
