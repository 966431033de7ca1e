"""RWKV-7 equals the loop over time of its definition, and goes on from its states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import LIBRARIES, Library, relative_error, tolerance

from subquad.scans.wkv7 import wkv7

Array = np.ndarray


def draw(n: int, batch: tuple[int, ...] = (2, 3), d: int = 8, d_v: int = 5) -> dict[str, Array]:
    """Inputs as a layer of RWKV-7 makes them: keys κ of length 1, a = −κ, b = κ ∘ rate, w from −0.6 to 0."""
    rng = np.random.default_rng(4)
    r, k, kappa, rate, w = rng.standard_normal((5, *batch, n, d))
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    rate, w = 1 / (1 + np.exp(-rate)), -np.exp(-0.5) / (1 + np.exp(-w))
    v, state = rng.standard_normal((*batch, n, d_v)), rng.standard_normal((*batch, d_v, d))
    return {"r": r, "k": k, "v": v, "w": w, "a": -kappa, "b": kappa * rate, "initial_state": state}


def loop(r: Array, k: Array, v: Array, w: Array, a: Array, b: Array, initial_state: Array) -> tuple[Array, Array]:
    S, o = initial_state, np.zeros(v.shape)
    for t in range(v.shape[-2]):
        matrix = np.eye(r.shape[-1]) * np.exp(w[..., t, None, :]) + a[..., t, :, None] * b[..., t, None, :]
        S = S @ matrix + v[..., t, :, None] * k[..., t, None, :]
        o[..., t, :] = (S @ r[..., t, :, None])[..., 0]
    return o, S


def call(given: dict[str, Any], **options: Any) -> Any:
    return wkv7(*(given[name] for name in "rkvwab"), initial_state=given.get("initial_state"), **options)


@pytest.mark.parametrize("library", [pytest.param(*x.values, id=x.id, marks=x.marks) for x in LIBRARIES])
def test_equals_the_loop(library: Library) -> None:
    given = draw(63)
    for dtype in library.dtypes:
        got = library.call(call, given, dtype=dtype)
        expected = loop(**library.rounded(given, dtype)) if library.has_values else loop(**given)
        assert library.dtype_name(got[0]) == dtype
        for x, reference in zip(got, expected, strict=True):
            assert tuple(x.shape) == reference.shape
            if library.has_values:
                assert relative_error(library.numpy(x), reference) <= tolerance(dtype)


@pytest.mark.parametrize("implementation", ["auto", "generic"])
@pytest.mark.parametrize("n", [1, 2, 257])
def test_goes_on_from_its_state(n: int, implementation: str) -> None:
    given = draw(n)
    o, state = call(given, implementation=implementation)
    for x, reference in zip((o, state), loop(**given), strict=True):
        assert relative_error(x, reference) <= tolerance("float64")
    cut = n // 2
    start, parts = given["initial_state"], []
    for rows in (slice(0, cut), slice(cut, n)):
        part = {name: given[name][..., rows, :] for name in "rkvwab"}
        out, start = call(part | {"initial_state": start}, implementation=implementation)
        parts.append(out)
    assert relative_error(np.concatenate(parts, axis=-2), o) <= 1e-13
    assert relative_error(start, state) <= 1e-13


def test_from_the_end() -> None:
    given = draw(20)
    turned = {name: x if name[0] == "i" else np.flip(x, -2) for name, x in given.items()}
    o, state = call(given, reverse=True)
    for x, y in zip((np.flip(o, -2), state), call(turned), strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w": np.ones((2, 3, 20, 1))}, ["w has shape", "(..., 20, 8)"]),
        ({"initial_state": np.ones((8, 5))}, ["initial_state has shape (8, 5)", "(..., 5, 8)", "channels of v"]),
    ],
    ids=["w", "state"],
)
def test_errors_name_the_argument(change: dict[str, Array], words: list[str]) -> None:
    with pytest.raises(ValueError, match="has shape") as raised:
        call(draw(20) | change)
    assert all(word in str(raised.value) for word in words)
