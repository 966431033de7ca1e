"""Gradients of rows before a number that is not finite are those without it, by queries, keys and values alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.kernels import without_overrides
from rows.libraries import Jax, Library, Torch, relative_error, tolerance
from rows.methods import MAIN_CAUSAL, Case, Row, rows, seeing
from rows.methods import D as WIDTH

N, STEP = 70, 40
CASE = Case((2, N, WIDTH), (2, N, WIDTH), (2, N, 3))
libraries = pytest.mark.parametrize("library", [Torch(), Jax()], ids=str)


@pytest.fixture(params=["auto", "generic"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "generic":
        without_overrides(monkeypatch)


def gradients(library: Library, row: Row, *several: dict[str, np.ndarray], read: int) -> list[Any]:
    """The gradients by q, k and v of a sum over the first `read` rows, for several inputs."""
    arrays = row.arrays(CASE)

    def loss(q: Any, k: Any, v: Any, arrays: Any) -> Any:
        out = row.call(causal=True)(q, k, v, None, arrays)[..., :read, :]
        return (out * out).sum()

    def by_torch(q: Any, k: Any, v: Any, arrays: Any) -> Any:
        torch = pytest.importorskip("torch")
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(loss(*leaves, arrays), leaves)

    def by_jax(*given: Any) -> Any:
        return pytest.importorskip("jax").grad(loss, (0, 1, 2))(*given)

    function = by_torch if type(library) is Torch else by_jax
    given = [(x["q"], x["k"], x["v"], arrays) for x in several]
    return [[library.numpy(x) for x in found] for found in library.calls(function, *given, dtype="float64")]


def spoilt(inputs: dict[str, np.ndarray], name: str, value: float) -> dict[str, np.ndarray]:
    x = inputs[name].copy()
    x[:, STEP, 1] = value
    return inputs | {name: x}


@libraries
@rows(seeing(MAIN_CAUSAL, "nothing", "place", "places"))
def test_those_of_earlier_rows_do_not_meet_it(library: Library, row: Row) -> None:
    inputs = {name: x for name, x in CASE.draw().items() if x is not None}
    others = [spoilt(inputs, name, value) for name in "qkv" for value in (np.nan, np.inf)]
    with np.errstate(all="ignore"):
        clean, *found = gradients(library, row, inputs, *others, read=STEP)
    for got in found:
        for by, expected in zip(got, clean, strict=True):
            assert np.all(expected[:, STEP:] == 0)
            assert relative_error(by[:, :STEP], expected[:, :STEP]) <= tolerance("float64")


@libraries
@rows([row for row in MAIN_CAUSAL if row.name in ("exact", "favor", "window")])
def test_those_of_rows_that_see_it_are_not_finite(library: Library, row: Row) -> None:
    """A gradient that is finite would hide that the loss is not."""
    inputs = {name: x for name, x in CASE.draw().items() if x is not None}
    with np.errstate(all="ignore"):
        found = gradients(library, row, *(spoilt(inputs, name, np.nan) for name in "qkv"), read=N)
    for got in found:
        assert not np.isfinite(got[2][:, STEP - 1]).any()  # row 40 sees value 39
