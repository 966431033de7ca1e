"""Corners in which a wrong sign, order, bound or axis would show: each test names the mistake that it is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.kernels import without_overrides
from rows.libraries import Jax, Library, NumPy, Torch, relative_error, tolerance
from rows.methods import CASES, Case, D, Row, given_center

import subquad

LIBRARIES = [pytest.param(x, id=str(x)) for x in (NumPy(), Torch(), Jax())]
ROWS = [
    Row("linear-negative", "linear", {"scale": -0.3}),
    Row("trigonometric-negative", "favor", {"num_features": 64, "features": "trigonometric", "scale": -0.05}),
    Row("relu-negative", "favor", {"num_features": 12, "features": "relu", "kernel_epsilon": 0.1, "scale": -0.2}),
    Row("center-negative", "favor", {"num_features": 12, "scale": -0.2}, arrays=given_center),
    Row("center-hyperbolic-negative", "favor", {"num_features": 12, "features": "hyperbolic", "scale": -0.2}, arrays=given_center),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_negative_scale(library: Library, row: Row) -> None:
    """The sign belongs to the queries alone, in whole calls, causal calls, and with centers."""
    for name in ("n=63", "grouped"):
        case = CASES[name]
        drawn, arrays = case.draw(), row.arrays(case)
        for causal in row.forms:
            got = library.call(row.call(causal=causal), *drawn.values(), arrays, dtype="float64")
            reference = row.reference(drawn, arrays, causal=causal)
            assert relative_error(library.numpy(got), reference) < 1e-8


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("wide", ["state", "q"])
def test_attend_computes_in_the_common_dtype(library: Library, wide: str) -> None:
    """The dtype of a state counts as much as that of the queries; the output has that of the queries."""
    if isinstance(library, Jax):
        pytest.skip("float64 is a switch of the whole program")
    q, k, v = np.random.default_rng(0).standard_normal((3, 200, 8)) * 3
    method = subquad.Linear()
    state = method.summarize(k, v)
    right = method.attend(q.astype(np.float32).astype(float) if wide == "state" else q, state)
    given = library.array(q, "float32" if wide == "state" else "float64")
    held = {name: library.array(x, "float64" if wide == "state" else "float32") for name, x in state.items()}
    got = method.attend(given, held)
    assert library.dtype_name(got) == library.dtype_name(given)
    error = relative_error(library.numpy(got), right)
    assert error < (2e-7 if wide == "state" else 1e-5)
    if wide == "q":  # in float64 nothing is lost beyond the state's rounding
        exact = method.attend(q, {name: library.numpy(x) for name, x in held.items()})
        assert relative_error(library.numpy(got), exact) < 1e-14


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("visible", [3, 4, 5])
def test_as_many_visible_keys_as_landmarks_are_exact(library: Library, visible: int) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 20, 8))
    mask = np.arange(20) < np.asarray([[visible], [20]])

    def nystrom(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return subquad.attention(q, k, v, "nystrom", num_landmarks=4, key_mask=mask)

    got = library.numpy(library.call(nystrom, q, k, v, mask, dtype="float64"))[0]
    exact = subquad.attention(q[0], k[0], v[0], "exact", key_mask=mask[0])
    assert (relative_error(got, exact) < 1e-12) == (visible <= 4)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("method", ["exact", "favor", "linear", "nystrom"])
def test_groups_of_heads_and_their_gradient(library: Library, method: str) -> None:
    """Query head h reads key head h // g, not h mod h_kv; gradients are summed over the heads that share a key."""
    options = {"num_landmarks": 5} if method == "nystrom" else {}
    for heads, key_heads in ((4, 2), (6, 3), (8, 2)):
        drawn = Case((2, heads, 23, D), (2, key_heads, 23, D), (2, key_heads, 23, 5)).draw()
        q, k, v = (drawn[name] for name in ("q", "k", "v"))
        wide = [np.repeat(x, heads // key_heads, axis=1) for x in (k, v)]

        def attend(q: Any, k: Any, v: Any) -> Any:
            return subquad.attention(q, k, v, method, **options)

        got = library.numpy(library.call(attend, q, k, v, dtype="float64"))
        assert relative_error(got, attend(q, *wide)) < 1e-10
        if isinstance(library, Torch):
            torch = pytest.importorskip("torch")
            own = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
            weights = torch.cos(torch.arange(float(got.size))).reshape(got.shape).double()
            found = torch.autograd.grad((attend(*own) * weights).sum(), own)
            full = [torch.from_numpy(x).requires_grad_() for x in (q, *wide)]
            right = torch.autograd.grad((attend(*full) * weights).sum(), full)
            for x, y in zip(found[1:], right[1:], strict=True):
                summed = y.reshape(2, key_heads, heads // key_heads, *y.shape[2:]).sum(2)
                assert relative_error(x.numpy(), summed.numpy()) < 1e-9


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("implementation", ["auto", "generic"])
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_channels_and_their_gradient(library: Library, implementation: str, groups: int) -> None:
    """Channel c reads group c // (d / groups), not c mod groups."""
    d, n, d_state = 8, 20, 3
    rng = np.random.default_rng(0)
    u, delta = rng.standard_normal((2, n, d)), rng.uniform(0.1, 1, (2, n, d))
    A = -rng.uniform(0.1, 1, (d, d_state))
    B, C = rng.standard_normal((2, 2, n, groups, d_state))

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
        return subquad.selective_scan(u, delta, A, B, C, implementation=implementation)

    right = np.concatenate(
        [
            scan(u[..., c : c + 1], delta[..., c : c + 1], A[c : c + 1], B[:, :, c // (d // groups)], C[:, :, c // (d // groups)])
            for c in range(d)
        ],
        axis=-1,
    )  # fmt: skip
    got = library.numpy(library.call(scan, u, delta, A, B, C, dtype="float64"))
    assert relative_error(got, right) < 1e-12
    if isinstance(library, Torch):
        torch = pytest.importorskip("torch")
        given = [torch.from_numpy(x).requires_grad_() for x in (u, delta, A, B, C)]
        weights = torch.cos(torch.arange(float(got.size))).reshape(got.shape).double()
        by_B, by_C = torch.autograd.grad((scan(*given) * weights).sum(), given[3:])
        wide = [x.repeat_interleave(d // groups, dim=2).detach().requires_grad_() for x in given[3:]]
        found = torch.autograd.grad((scan(*given[:3], *wide) * weights).sum(), wide)
        for x, y in zip((by_B, by_C), found, strict=True):
            summed = y.reshape(2, n, groups, d // groups, d_state).sum(3)
            assert relative_error(x.numpy(), summed.numpy()) < 1e-12


@pytest.mark.parametrize("features", ["relu", "positive"])
def test_blocks_of_a_traced_causal_loop(features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled program has a small number of large blocks, in their order, each cut into runs."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("subquad.kernels.feature_causal.CAUSAL_ROWS", 16)
    monkeypatch.setattr("subquad_torch.TRACED_BLOCKS", 3)
    q, k, v = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 2, 130, 8)))
    mask = torch.arange(130) % 5 > 0

    def attend(q: Any, k: Any, v: Any) -> Any:
        return subquad.attention(q, k, v, "favor", causal=True, features=features, num_features=12, key_mask=mask)

    right = attend(q, k, v)
    without_overrides(monkeypatch)
    got = torch.compile(attend, backend="eager", fullgraph=True)(q, k, v)
    torch._dynamo.reset()
    assert relative_error(got.numpy(), right.numpy()) < tolerance("float64")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", [(20, D), (1, 20, D), (2, 1, 20, D)])
def test_queries_of_one_head_read_the_keys_of_each(library: Library, shape: tuple[int, ...]) -> None:
    """Groups are of several query heads alone: the mistake is to make groups of none."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(x) for x in (shape, (3, 20, D), (3, 20, 5)))

    def attend(q: Any, k: Any, v: Any) -> Any:
        return subquad.attention(q, k, v, "exact")

    got = library.numpy(library.call(attend, q, k, v, dtype="float64"))
    assert got.shape == (*shape[:-3], 3, 20, 5)
    assert relative_error(got, attend(np.repeat(q, 3, axis=-3) if q.ndim > 2 else np.stack(3 * [q]), k, v)) < 1e-13


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_number_that_is_not_finite_is_0_in_the_landmark_of_its_query(library: Library) -> None:
    """Eight landmarks, each the mean of five rows: one of them has a 0 there, which other rows read."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 40, D))
    bad = q.copy()
    bad[7, 2] = np.nan
    landmarks = [x.reshape(8, 5, D).mean(axis=1) for x in (q, k)]
    landmarks[0][1, 2] = 0
    expected = subquad.Nystrom(landmarks=tuple(landmarks))(q, k, v)
    got = library.numpy(
        library.call(lambda q, k, v: subquad.Nystrom(num_landmarks=8)(q, k, v), bad, k, v, dtype="float64")
    )
    rest = np.arange(40) != 7
    assert np.isnan(got[7]).all()
    assert relative_error(got[rest], expected[rest]) < 1e-10


def test_trigonometric_features_around_zero_are_those_without_a_center() -> None:
    """Where no kernel is compiled; around another point, they are those of what is left."""
    xp = pytest.importorskip("array_api_strict")
    rng = np.random.default_rng(0)
    q, k, v = (xp.asarray(rng.standard_normal((30, 4))) for _ in range(3))
    zero, middle = xp.zeros(4, dtype=xp.float64), xp.asarray(rng.standard_normal(4))
    options = {"features": "trigonometric", "num_features": 8, "seed": 0}
    plain = subquad.attention(q, k, v, "favor", **options)
    assert np.allclose(
        np.asarray(subquad.attention(q, k, v, "favor", center=(zero, zero), **options)), np.asarray(plain)
    )
    moved = subquad.attention(q + middle, k, v, "favor", center=(middle, zero), **options)
    factors = np.exp(np.asarray(k) @ np.asarray(middle) * 0.5)[:, None]  # what the center of queries adds to logits
    weighed = subquad.attention(
        q, k, xp.asarray(np.concatenate([np.asarray(v) * factors, factors], axis=1)), "favor", **options
    )
    assert np.allclose(np.asarray(moved), np.asarray(weighed)[:, :4] / np.asarray(weighed)[:, 4:])
