"""Random projections are values: the same on every library, orthogonal, of the right length, and unbiased."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import Library

import subquad

PROJECTIONS = ("orthogonal", "hadamard", "givens", "iid")
D = 16


def omega_in_use(library: Library, dtype: str, **options: Any) -> np.ndarray:
    """ω as the method multiplies with it: rows of the identity, at scale 1, are projected to the columns of ω."""
    seen: list[Any] = []

    def features(projected: Any) -> Any:
        seen.append(projected)
        return projected * projected

    def call(x: Any) -> Any:
        seen.clear()
        method = subquad.Favor(features=features, **options)
        method(x, x, x, scale=1.0)
        return seen[0]

    projected = library.call(call, np.eye(D), dtype=dtype)
    return library.host(projected).T


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_same_seed_gives_the_same_bits(eager: Library, projection: str) -> None:
    for dtype in ("float64", "float32"):
        options = {"num_features": 40, "seed": 3, "projection": projection}
        drawn = subquad.draw_omega(projection, 40, D, 3)
        used = omega_in_use(eager, dtype, **options)
        assert used.dtype == dtype
        assert used.tobytes() == np.ascontiguousarray(drawn.astype(dtype)).tobytes()
        assert used.tobytes() == omega_in_use(eager, dtype, **options).tobytes()


def test_given_omega_is_used_as_it_is(eager: Library) -> None:
    omega = np.random.default_rng(0).standard_normal((7, D)).astype(np.float32)
    assert omega_in_use(eager, "float32", omega=omega).tobytes() == omega.tobytes()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_same_seed_gives_the_same_output_on_every_library(eager: Library, projection: str) -> None:
    q, k, v = np.random.default_rng(1).standard_normal((3, 20, D)) / 4
    method = subquad.Favor(num_features=32, seed=9, projection=projection)
    out = eager.numpy(eager.call(lambda q, k, v: method(q, k, v), q, k, v, dtype="float64"))
    assert np.max(np.abs(out - method(q, k, v))) < 1e-12


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_first_rows_stay_when_more_are_asked_for(projection: str) -> None:
    long = subquad.draw_omega(projection, 70, D, 5)
    for m in (1, D, D + 1, 50):
        assert np.array_equal(subquad.draw_omega(projection, m, D, 5), long[:m])


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_another_seed_or_block_is_another_draw(projection: str) -> None:
    first, second = (subquad.draw_omega(projection, 2 * D, D, seed) for seed in (0, 1))
    assert np.max(np.abs(first - second)) > 0.1
    assert np.max(np.abs(first[:D] - first[D:])) > 0.1  # one peer draws every block alike


def test_golden_values() -> None:
    """The promise of a seed: these numbers stay. NumPy fixes PCG64's stream; six digits survive any LAPACK."""
    golden = subquad.draw_omega("orthogonal", 2, 2, 0)
    assert np.allclose(golden, [[0.773696, 0.394410], [-0.521868, 1.023724]], atol=1e-6)


def test_cached_arrays_cannot_be_written_to() -> None:
    omega = subquad.draw_omega("orthogonal", 4, 4, 0)
    with pytest.raises(ValueError, match="read-only"):
        omega[0, 0] = 1.0


@pytest.mark.parametrize("d", [12, 16])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_mean_squared_length_is_d(projection: str, d: int) -> None:
    """|ω|² ~ χ²(d) has variance 2 d: within 5 standard errors of d over 8192 rows. A wrong scale is far off."""
    omega = subquad.draw_omega(projection, 8192, d, 1)
    squares = (omega**2).sum(axis=1)
    # columns that Hadamard's cut removes make the length of a row vary more, at most twice the variance
    assert abs(squares.mean() - d) < 5 * np.sqrt(2 * 2 * d / 8192)
    if projection != "hadamard" or d == 16:
        assert abs(squares.var() / (2 * d) - 1) < 5 * np.sqrt(12 / 8192)  # kurtosis of χ²(d): 12 / d


@pytest.mark.parametrize("projection", ["orthogonal", "hadamard", "givens"])
def test_rows_of_a_block_are_orthogonal(projection: str) -> None:
    omega = subquad.draw_omega(projection, 3 * D - 2, D, 2)
    for block in (omega[:D], omega[D : 2 * D], omega[2 * D :]):
        gram = block @ block.T
        lengths = np.sqrt(np.diagonal(gram))
        cosines = gram / np.outer(lengths, lengths)
        assert np.max(np.abs(cosines - np.eye(len(block)))) < 1e-12
    across = omega[:D] @ omega[D : 2 * D].T
    assert np.max(np.abs(across)) > 1  # other blocks are independent


def test_orthogonal_blocks_are_haar() -> None:
    """The trace of a Haar matrix has mean 0 and variance 1; that of QR without its signs corrected is below −1."""
    draws = 400
    traces, corners = [], []
    for seed in range(draws):
        omega = subquad.draw_omega("orthogonal", 8, 8, seed)
        o = omega / np.linalg.norm(omega, axis=1, keepdims=True)
        traces.append(np.trace(o))
        corners.append(o[0, 0])
    assert abs(np.mean(traces)) < 4 / np.sqrt(draws)
    assert abs(np.var(traces) - 1) < 4 * np.sqrt(2 / draws)
    assert abs(np.mean(corners)) < 4 * np.sqrt(1 / 8 / draws)  # a column of a Haar matrix is uniform on the sphere


def test_global_generators_are_untouched() -> None:
    torch = pytest.importorskip("torch")
    before_numpy, before_torch = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    q = torch.randn(20, D, generator=torch.Generator().manual_seed(0))
    for projection in PROJECTIONS:
        subquad.attention(q, q, q, "favor", num_features=30, seed=7701, projection=projection)
        subquad.attention(q.numpy(), q.numpy(), q.numpy(), "favor", num_features=31, seed=7701, projection=projection)
    subquad.attention(q, q, q, "nystrom", num_landmarks=4, landmarks="uniform", seed=7701)
    subquad.attention(q, q, q, "nystrom", num_landmarks=2, landmarks="kmeans", seed=7701)
    subquad.attention(q, q, q, "linformer", projection="random", seed=7701)
    after = np.random.get_state()  # noqa: NPY002
    assert before_numpy[2:] == after[2:]
    assert np.array_equal(before_numpy[1], after[1])
    assert torch.equal(before_torch, torch.get_rng_state())


@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
def test_kernel_estimate_is_unbiased(projection: str) -> None:
    """E φ(q)·φ(k) = exp(q·k), within 4 standard errors over 2000 seeds."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 4)) / 2
    half = (q @ q + k @ k) / 2
    estimates = {"positive": [], "hyperbolic": [], "trigonometric": []}
    for seed in range(2000):
        omega = subquad.draw_omega(projection, 4, 4, seed)
        estimates["positive"].append(np.exp(omega @ (q + k) - half).mean())
        estimates["hyperbolic"].append(np.cosh(omega @ (q + k)).mean() * np.exp(-half))
        estimates["trigonometric"].append(np.cos(omega @ (q - k)).mean() * np.exp(half))
    for name, values in estimates.items():
        assert abs(np.mean(values) - np.exp(q @ k)) < 4 * np.std(values) / np.sqrt(2000), name


def errors(features: str, sizes: tuple[int, ...], projection: str = "iid") -> list[float]:
    """Root-mean-square error over seeds of the output, for each number of features."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 40, D)) / np.array([[[2]], [[2]], [[1]]])
    exact = subquad.attention(q, k, v, "exact")

    def squared(m: int, seed: int) -> float:
        method = subquad.Favor(num_features=m, seed=seed, features=features, projection=projection)
        return float(np.mean((method(q, k, v) - exact) ** 2))

    return [float(np.sqrt(np.mean([squared(m, seed) for seed in range(12)]))) for m in sizes]


@pytest.mark.parametrize("features", ["positive", "hyperbolic", "trigonometric"])
def test_error_falls_as_one_over_sqrt_m(features: str) -> None:
    """The law of a mean of m independent draws: slope −1/2. Over a factor 64 in m and 12 seeds of 640 outputs, whose
    spread of about 10 % per point moves a slope over log 64 = 4.2 by 0.04."""
    sizes = (64, 256, 1024, 4096)
    slope = np.polyfit(np.log(sizes), np.log(errors(features, sizes)), 1)[0]
    assert abs(slope + 0.5) < 0.1


def test_orthogonal_features_err_less_than_independent_ones() -> None:
    """Theorem 2 of the Performer's paper, for m ≤ d."""
    assert errors("positive", (D,), "orthogonal")[0] < errors("positive", (D,), "iid")[0]


def test_uniform_landmarks_depend_on_the_seed_alone() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 50, 4))
    outs = [
        subquad.attention(q, k, v, "nystrom", num_landmarks=5, landmarks="uniform", seed=seed) for seed in (1, 1, 2)
    ]
    assert np.array_equal(outs[0], outs[1])
    assert np.max(np.abs(outs[0] - outs[2])) > 1e-3


def test_output_depends_on_every_random_option() -> None:
    """Nothing is accepted and ignored."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 30, 8))
    base = subquad.attention(q, k, v, "favor")
    for options in (
        {"num_features": 255},
        {"seed": 1},
        {"projection": "iid"},
        {"projection": "hadamard"},
        {"projection": "givens"},
        {"features": "hyperbolic"},
        {"features": "trigonometric"},
        {"features": "relu"},
        {"center": True},
        {"scale": 0.1},
        {"omega": np.ones((3, 8))},
    ):
        assert np.max(np.abs(subquad.attention(q, k, v, "favor", **options) - base)) > 1e-6, options
