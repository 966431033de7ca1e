"""Numbers of any size: exponents far apart, products that overflow, half precision, long sums, hidden rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.kernels import without_overrides
from rows.libraries import Jax, Library, NumPy, Strict, Torch, relative_error

import subquad
from subquad.attention.landmarks import segment_means
from subquad.attention.means import mean_row
from subquad.core.beside import namespace_of
from subquad.core.loading import backend_of
from subquad.kernels.segment_means import means_of_any, means_of_segments

FEW = [pytest.param(x, id=str(x)) for x in (NumPy(), Strict(), Torch(), Jax())]


@pytest.mark.parametrize("implementation", ["auto", "generic"])
@pytest.mark.parametrize("library", FEW)
@pytest.mark.parametrize(("method", "options"), [
    ("favor", {}), ("favor", {"features": "hyperbolic", "num_features": 40}), ("linear", {}),
    ("favor", {"center": (np.full(32, 9.0), np.full(32, -7.0))}),
])  # fmt: skip
def test_causal_features_of_any_size(
    method: str, options: dict[str, Any], library: Library, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of far keys underflow in one row and not in another: each row must be that of the definition."""
    if (isinstance(library, Jax) and (method, options) != ("favor", {})) or (
        isinstance(library, Strict) and implementation == "auto"
    ):
        pytest.skip("a program takes long to compile, and shows no more; the strict library has no overrides")
    if implementation == "generic":
        without_overrides(monkeypatch)
    x = 30 * np.random.default_rng(0).standard_normal((300, 32))
    x[280:] = x[:20]  # later rows that see an equal key far before them
    mask = np.arange(300) % 7 > 0
    for key_mask in (None, mask):
        exact = subquad.attention(x, x, x, method, causal=True, key_mask=key_mask, **options)

        def attend(x: Any, key_mask: Any) -> Any:
            return subquad.attention(x, x, x, method, causal=True, key_mask=key_mask, **options)

        for dtype, bound in (("float32", 1e-4), ("float64", 1e-12)):
            got = library.numpy(library.call(attend, x, key_mask, dtype=dtype))
            assert relative_error(got, exact) < bound


def test_causal_features_of_any_size_equal_their_definition() -> None:
    """Sums over logarithms in float64, which nothing can underflow."""
    x = 30 * np.random.default_rng(0).standard_normal((300, 32))
    omega = subquad.draw_omega("orthogonal", 256, 32, 0) * 32**-0.25
    log_q, log_k = x @ omega.T, x @ omega.T - (x * x).sum(-1, keepdims=True) / 2 * 32**-0.5
    log = np.logaddexp.reduce(log_q[:, None] + log_k, axis=-1)
    log[~np.tri(300, dtype=bool)] = -np.inf
    weights = np.exp(log - log.max(axis=-1, keepdims=True))
    right = weights @ x / weights.sum(axis=-1, keepdims=True)
    for dtype, bound in ((np.float64, 1e-11), (np.float32, 1e-4)):
        got = subquad.attention(*3 * [x.astype(dtype)], "favor", causal=True)
        assert relative_error(got, right) < bound


@pytest.mark.parametrize("implementation", ["auto", "generic"])
@pytest.mark.parametrize(("method", "scale", "shape"), [
    ("favor", 10, (300, 32)), ("favor", 20, (300, 32)), ("favor", 20, (5, 4)), ("linear", 60, (300, 32)),
    ("linear", 100, (40, 4)),
])  # fmt: skip
def test_gradient_of_causal_features_of_any_size(
    method: str, scale: float, shape: tuple[int, int], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of a row that is computed again may be so small that their slope is infinite: 0 times it is NaN."""
    torch = pytest.importorskip("torch")
    if implementation == "generic":
        without_overrides(monkeypatch)
    rng = np.random.default_rng(0)
    drawn = [scale * rng.standard_normal(shape), scale * rng.standard_normal(shape), rng.standard_normal((shape[0], 3))]
    options = {"num_features": 64} if method == "favor" else {}
    found = []
    for dtype in (torch.float64, torch.float32):
        given = [torch.from_numpy(x).to(dtype).requires_grad_() for x in drawn]
        out = subquad.attention(*given, method, causal=True, **options)
        found.append([x.double().numpy() for x in torch.autograd.grad(out.sum(), given)])
    for got, right in zip(found[1], found[0], strict=True):
        assert np.abs(got - right).max() < 1e-4 * max(1.0, np.abs(right).max())


def test_gradient_of_causal_features_of_any_size_under_jax(jax_library: Jax) -> None:
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(0)
    q, k, v = 20 * rng.standard_normal((5, 4)), 20 * rng.standard_normal((5, 4)), rng.standard_normal((5, 3))

    def loss(q: Any, k: Any, v: Any) -> Any:
        return subquad.attention(q, k, v, "favor", causal=True, num_features=64).sum()

    found = jax_library.call(jax.grad(loss, (0, 1, 2)), q, k, v, dtype="float32")
    assert all(np.isfinite(jax_library.numpy(x)).all() for x in found)


@pytest.mark.parametrize("implementation", ["auto", "generic"])
@pytest.mark.parametrize("library", FEW)
def test_growing_scans_of_zeros_stay_zero(library: Library, implementation: str) -> None:
    """exp(Δ A) over many steps overflows, but the state that it multiplies is 0."""
    n = 3000
    u, one = np.zeros((n, 2)), np.ones((n, 3))
    u[-1] = 1

    def scan(u: Any, delta: Any, A: Any, one: Any) -> Any:
        return subquad.selective_scan(u, delta, A, one, one, implementation=implementation)

    y = library.numpy(library.call(scan, u, np.ones((n, 2)), np.ones((2, 3)), one, dtype="float32"))
    assert np.array_equal(y[:-1], np.zeros((n - 1, 2)))
    assert np.array_equal(y[-1], [3, 3])

    def linear(a: Any, b: Any) -> Any:
        return subquad.linear_scan(a, b, implementation=implementation)

    a = np.full((n, 2), 2.0)
    h = library.numpy(library.call(linear, a, u, dtype="float32"))
    assert np.array_equal(h, u)
    a[1::2, 1] = 0  # a factor of 0 forgets a product that has overflowed
    h = library.numpy(library.call(linear, a, u, dtype="float32"))
    assert np.array_equal(h, u)


def test_merged_scans_of_zeros_stay_zero() -> None:
    a, b = np.full((2000, 1), 2.0), np.zeros((2000, 1))
    state = subquad.summarize_scan("linear_scan", a, b)
    for _ in range(3):
        state = subquad.merge_scan(state, state)
    assert np.isinf(state["decay"])
    assert state["state"] == 0
    none = subquad.summarize_scan("linear_scan", 0 * a, b)
    for pair in ((none, state), (state, none)):
        assert subquad.merge_scan(*pair)["decay"] == 0


@pytest.mark.parametrize("library", FEW)
@pytest.mark.parametrize("wide", ["initial_state", "C", "A"])
def test_half_precision_beside_float64_is_computed_in_float64(library: Library, wide: str) -> None:
    if "float16" not in library.known_dtypes or isinstance(library, Strict | Jax):
        pytest.skip("no half precision beside float64")
    rng = np.random.default_rng(0)
    n, d, d_state = 40, 3, 2
    given = {
        "u": rng.standard_normal((n, d)),
        "delta": rng.uniform(0.1, 1, (n, d)),
        "A": -rng.uniform(0.1, 1, (d, d_state)),
        "B": rng.standard_normal((n, d_state)),
        "C": rng.standard_normal((n, d_state)),
        "initial_state": rng.standard_normal((d, d_state)),
    }
    exact = {
        name: x if name in (wide, "initial_state") else x.astype(np.float16).astype(float) for name, x in given.items()
    }

    def scan(given: dict[str, Any], **options: Any) -> Any:
        return subquad.selective_scan(
            *(given[x] for x in ("u", "delta", "A", "B", "C")),
            initial_state=given["initial_state"],
            return_state=True,
            **options,
        )

    _, right = scan(exact)
    arrays = {
        name: library.array(x, "float64" if name in (wide, "initial_state") else "float16") for name, x in given.items()
    }
    for implementation in ("auto", "generic"):
        y, state = scan(arrays, implementation=implementation)
        assert library.dtype_name(y) == "float16"
        assert library.dtype_name(state) == "float64"
        assert relative_error(library.numpy(state), right) < 1e-14


@pytest.mark.parametrize("landmarks", ["uniform", "segment-means"])
def test_hidden_rows_reach_no_gradient(landmarks: str) -> None:
    torch = pytest.importorskip("torch")
    for hidden in (3, 2):
        q = torch.rand(3, 2, requires_grad=True)
        k = torch.full((3, 2), torch.nan)
        k[hidden:] = 1.0
        mask = torch.arange(3) >= hidden
        out = subquad.attention(
            q,
            k,
            k[:, :1],
            "nystrom",
            num_landmarks=2,
            landmarks=landmarks,
            key_mask=mask,
            query_mask=torch.ones(3, dtype=torch.bool),
        )
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("d", [3, 20, 70])  # of few numbers, and of so many that a kernel takes them
@pytest.mark.parametrize("library", FEW)
def test_means_of_numbers_near_the_largest_do_not_overflow(library: Library, d: int) -> None:
    rng = np.random.default_rng(0)
    x = (np.finfo(np.float32).max * (0.9 + 0.1 * rng.random((2, 1205, d)))).astype(np.float32)
    mask = rng.random((2, 1205)) < 0.7
    rows, keep = library.array(x, "float32"), library.array(mask, "float32")
    xp = namespace_of(rows)
    expected, kept = x.astype(np.float64), np.where(mask[..., None], x, np.nan).astype(np.float64)
    parts = [kept[i][mask[i]] for i in range(2)]
    cases = [
        (mean_row(xp, rows, None), expected.mean(axis=-2, keepdims=True)),
        (mean_row(xp, rows, keep), np.nanmean(kept, axis=-2, keepdims=True)),
        (segment_means(xp, rows, None, 5)[0], expected.reshape(2, 5, 241, d).mean(axis=-2)),
        (means_of_segments(xp, rows, 7), np.stack([x.mean(axis=-2) for x in np.array_split(expected, 7, axis=-2)], 1)),
        (segment_means(xp, rows, keep, 7)[0], np.stack([[x.mean(0) for x in np.array_split(p, 7)] for p in parts])),
    ]
    if not isinstance(library, Strict):  # whose `where` takes no two plain numbers; the lengths of programs are none
        cases.append((means_of_any(xp, rows, 7, 172, 1), cases[3][1]))
    for found, right in cases:
        np.testing.assert_allclose(library.numpy(found), right, rtol=1205 * 2.0**-24)


@pytest.mark.parametrize("library", [pytest.param(x, id=str(x)) for x in (NumPy(), Torch(), Jax())])
def test_few_queries_over_a_long_cache(library: Library) -> None:
    """Sums over 2¹⁸ keys, for one or a small number of queries, and values of one or more columns."""
    n = 2**18
    k = np.random.default_rng(0).standard_normal((n, 64)).astype(np.float32)
    for queries, d_v in ((1, 64), (2, 8), (4, 2), (1, 1)):
        q = np.random.default_rng(1).standard_normal((queries, 64)).astype(np.float32)
        v = np.random.default_rng(2).uniform(size=(n, d_v)).astype(np.float32)
        logits = q.astype(float) @ k.T.astype(float) / 8
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        right = weights @ v / weights.sum(axis=-1, keepdims=True)
        for causal in (False, True):
            if causal and queries > 1:
                continue

            def attend(q: Any, k: Any, v: Any, causal: bool = causal) -> Any:
                return subquad.attention(q, k, v, "exact", causal=causal)

            got = library.numpy(library.call(attend, q, k, v, dtype="float32"))
            assert relative_error(got, right) < 5e-6


def test_few_causal_queries_over_a_long_cache() -> None:
    torch = pytest.importorskip("torch")
    n, d = 2**17, 16
    k = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
    q = np.random.default_rng(1).standard_normal((3, d)).astype(np.float32)
    right = subquad.attention(*(x.astype(float) for x in (q, k, k)), "exact", causal=True)
    got = subquad.attention(*map(torch.from_numpy, (q, k, k)), "exact", causal=True)
    assert relative_error(got.double().numpy(), right) < 5e-6


def test_exponentials_of_differences_are_written_over_where_they_fit() -> None:
    """By PyTorch over the first array alone where nothing is recorded and the result has its shape."""
    torch = pytest.importorskip("torch")
    backend = backend_of(torch)
    x, y = torch.ones(1, 3), torch.zeros(2, 3)
    wide = backend.exp_difference(torch, x, y)
    assert wide.shape == (2, 3)
    assert (x == 1).all()
    assert backend.exp_difference(torch, torch.ones(3, 1), torch.zeros(2, 3, 1)).shape == (2, 3, 1)
    over = backend.exp_difference(torch, y, x)
    assert over.data_ptr() == y.data_ptr()
    recorded = torch.ones(3, requires_grad=True)
    assert backend.exp_difference(torch, recorded, x).data_ptr() != recorded.data_ptr()
