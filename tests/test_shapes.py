"""Shapes and options drawn by Hypothesis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows import definitions
from rows.libraries import relative_error

import subquad

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(deadline=None, max_examples=40, derandomize=True)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """q, k, v that broadcast, with or without a mask; no method errs on any of them."""
    n, n_kv, d, d_v = (draw(st.integers(1, top)) for top in (20, 20, 5, 4))
    batch = draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))

    def shape(rows: int, width: int) -> tuple[int, ...]:
        mine = tuple(size if draw(st.booleans()) else 1 for size in batch)
        return (*mine[draw(st.integers(0, len(batch))) :], rows, width)

    rng = np.random.default_rng(draw(st.integers(0, 99)))
    q, k, v = (rng.standard_normal(shape(*size)) for size in ((n, d), (n_kv, d), (n_kv, d_v)))
    mask = None if draw(st.booleans()) else rng.random((*batch, n_kv)) < draw(st.sampled_from([0.0, 0.4, 0.9]))
    scale = draw(st.sampled_from([None, 0.3, -0.2]))
    return {"q": q, "k": k, "v": v, "key_mask": mask, "scale": scale}


def check(problem: dict[str, Any], method: str, definition: Any, *, causal: bool, **options: Any) -> None:
    given_ = [problem[name] for name in ("q", "k", "v")]
    mask, scale = problem["key_mask"], problem["scale"]
    omega = {name: options.pop(name) for name in ("omega",) if name in options}
    got = subquad.attention(*given_, method, causal=causal, key_mask=mask, scale=scale, **options, **omega)
    expected = definitions.over_heads(definition, *given_, mask, causal=causal, scale=scale, **options, **omega)
    assert relative_error(got, expected) < 1e-11


@few
@given(problems(), st.booleans())
def test_exact(problem: dict[str, Any], causal: bool) -> None:
    check(problem, "exact", definitions.exact, causal=causal)


@few
@given(problems(), st.booleans(), st.integers(1, 20), st.sampled_from(["positive", "hyperbolic"]))
def test_favor(problem: dict[str, Any], causal: bool, m: int, features: str) -> None:
    omega = subquad.draw_omega("iid", m, problem["q"].shape[-1], 1)
    check(problem, "favor", definitions.favor, causal=causal, omega=omega, features=features)


@few
@given(
    problems(),
    st.integers(1, 12),
    st.sampled_from(["segment-means", "uniform", "kmeans"]),
    st.sampled_from(["iterative", "ridge"]),
)
def test_nystrom(problem: dict[str, Any], m: int, landmarks: str, pinv: str) -> None:
    check(problem, "nystrom", definitions.nystrom, causal=False, num_landmarks=m, landmarks=landmarks, pinv=pinv)


@few
@given(problems(), st.integers(1, 12), st.sampled_from([None, 0.01, 1.0]))
def test_ridge_fit(problem: dict[str, Any], m: int, ridge: float | None) -> None:
    options = {"landmarks": "kmeans", "pinv": "ridge-fit", "ridge": ridge}
    check(problem, "nystrom", definitions.nystrom, causal=False, num_landmarks=m, **options)


@few
@given(problems(), st.integers(1, 12), st.sampled_from(["mean", "random"]))
def test_linformer(problem: dict[str, Any], rank: int, projection: str) -> None:
    check(problem, "linformer", definitions.linformer, causal=False, rank=rank, projection=projection)


@few
@given(problems(), st.booleans())
def test_linear(problem: dict[str, Any], causal: bool) -> None:
    problem["scale"] = None if problem["scale"] is None else abs(problem["scale"])
    check(problem, "linear", definitions.linear, causal=causal)


@few
@given(st.integers(0, 80), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans())
def test_scan(n: int, width: int, d_state: int, groups: int, complex_: bool, reverse: bool) -> None:
    rng = np.random.default_rng(n)
    d = width * groups
    maps = rng.standard_normal((2, 1, n, groups, d_state)) + 1j * complex_ * rng.standard_normal(
        (2, 1, n, groups, d_state)
    )
    B, C = maps if complex_ else maps.real
    A = -rng.uniform(0.1, 2, (d, d_state)) + (1j if complex_ else 0)
    u, delta = rng.standard_normal((1, n, d)), rng.uniform(0.1, 1, (1, n, d))
    y, state = subquad.selective_scan(u, delta, A, B, C, reverse=reverse, return_state=True)
    expected = definitions.selective_scan(u[0], delta[0], A, B[0], C[0], reverse=reverse)
    assert relative_error(y[0], expected[0]) < 1e-12
    assert relative_error(state[0], expected[1]) < 1e-12


@few
@given(st.integers(0, 80), st.integers(0, 4), st.sampled_from(["auto", "generic"]), st.booleans(), st.data())
def test_linear_scan(n: int, d: int, implementation: str, reverse: bool, data: st.DataObject) -> None:
    rng = np.random.default_rng(n)
    batch = data.draw(st.lists(st.integers(0, 3), max_size=2).map(tuple))

    def normal(*tail: int) -> np.ndarray:
        shape = tuple(1 if data.draw(st.booleans()) else size for size in batch)[data.draw(st.integers(0, 2)) :]
        x = rng.standard_normal((*shape, *tail))
        return x * np.exp(1j * x) if data.draw(st.booleans()) else x

    a, b, state = normal(n, d) / 3, normal(n, d), normal(d) if data.draw(st.booleans()) else None
    options = {"reverse": reverse, "return_state": True, "implementation": implementation}
    got = subquad.linear_scan(a, b, initial_state=state, **options)
    for x, expected in zip(got, definitions.linear_scan(a, b, state, reverse=reverse), strict=True):
        assert x.dtype == expected.dtype
        assert relative_error(x, expected) < 1e-12


@few
@given(problems(), st.integers(1, 19))
def test_chunks(problem: dict[str, Any], cut: int) -> None:
    """Two chunks merge to the whole, wherever the cut is."""
    method, (q, k, v) = subquad.Favor(num_features=5), (problem[name] for name in ("q", "k", "v"))
    keywords = {"scale": problem["scale"]}
    mask = problem["key_mask"]
    parts = [
        method.summarize(
            k[..., part, :], v[..., part, :], key_mask=None if mask is None else mask[..., part], **keywords
        )
        for part in (slice(None, cut), slice(cut, None))
    ]
    if min(q.ndim, k.ndim, v.ndim) >= 3 and 1 < parts[0]["denominator"].shape[-3] < q.shape[-3]:
        return  # heads would be grouped
    out = method.attend(q, method.merge(*parts), **keywords)
    full = method(q, k, v, key_mask=mask, **keywords)
    assert relative_error(np.broadcast_to(out, full.shape), full) < 1e-11
