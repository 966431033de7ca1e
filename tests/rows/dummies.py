"""A method and a scan of which no test knows: what is written for a new one, and not a line more.

As a plugin of pytest (`-p rows.dummies`) they are there before the tests are collected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace

import subquad
from rows import definitions
from subquad import registry
from subquad.attention.call import AttentionCall
from subquad.attention.feature_method import FeatureMethod, Mapped
from subquad.core.states import StateSpec, merge_by_decay
from subquad.kernels.feature_map import Rowwise

Array = np.ndarray


def one_and_square(x: Any) -> Any:
    return 1 + x * x


@dataclass(frozen=True, repr=False, eq=False)
class Squares(FeatureMethod):
    """Attention through φ(x) = 1 + x², or φ(x)^p: a map with a state, causal and in chunks."""

    power: int = 1

    def _map(self, call: AttentionCall) -> Mapped:
        like = call.k if call.q is None else call.q
        root = abs(call.scale) ** 0.5
        phi = one_and_square if self.power == 1 else lambda x: one_and_square(x) ** self.power
        return Rowwise(phi, root, root, like.shape[-1]), ()


def squares(
    q: Array, k: Array, v: Array, keep: Array, *, causal: bool, scale: float | None = None, power: int = 1
) -> Array:
    """Its definition."""
    root = (q.shape[1] ** -0.5 if scale is None else scale) ** 0.5
    weights = one_and_square(root * q) ** power @ (one_and_square(root * k) ** power).T
    return definitions.normalised(np.where(definitions.visible(len(q), keep, causal), weights, 0), v)


def blend(g: Any, x: Any, /, *, initial_state: Any = None, **options: Any) -> Any:
    """h[t] = (1 − g[t]) h[t−1] + g[t] x[t]."""
    return subquad.linear_scan(1 - g, g * x, initial_state=initial_state, **options)


def blend_by_definition(arrays: Mapping[str, Array], options: Mapping[str, Any]) -> Array:
    g, x = arrays["g"], arrays["x"]
    h, out = arrays.get("initial_state", np.zeros(x.shape[-1])), np.empty_like(x)
    for t in range(len(x))[:: -1 if options.get("reverse") else 1]:
        h = out[t] = (1 - g[t]) * h + g[t] * x[t]
    return out


def draw_blend(rng: np.random.Generator, n: int) -> tuple[dict[str, Array], dict[str, Any]]:
    return {"g": rng.uniform(0.01, 1, (n, 5)), "x": rng.standard_normal((n, 5))}, {}


def decay_of_blend(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    return array_namespace(arrays["g"]).prod(1 - arrays["g"], axis=-2)


NAMES = ("squares", "blend")


def register() -> None:
    registry.register("squares", aliases=("squared",), cost="n d d_v", size="power", defaults=({"power": 1},))(Squares)
    definitions.squares = squares  # type: ignore[attr-defined]
    registry.register_scan(
        "blend", state=StateSpec({"state": ("d",), "decay": ("d",)}, merge_by_decay), decay=decay_of_blend,
        draw=draw_blend, cost="n d", positional=("g", "x"), reference=blend_by_definition,
    )(blend)  # fmt: skip


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """They are there for a while."""
    register()
    try:
        yield
    finally:
        del registry.METHODS["squares"], registry.ALIASES["squared"], registry.SCANS["blend"]


def pytest_configure() -> None:
    """Called of a plugin alone."""
    register()
