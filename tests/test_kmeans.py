"""Landmarks by k-means, and values that are fitted to exact attention: what they gain, and where they are exact."""

from __future__ import annotations

import tracemalloc
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest
from rows import definitions
from rows.libraries import Library, Torch, relative_error
from rows.methods import Case, D

import subquad
from subquad.attention.kmeans import Clusters, find_clusters
from subquad.attention.ridge_fit import LAMBDAS, Fit, fit_values, read_values
from subquad.cli.inputs import read_sample
from subquad.kernels import nearest

N = 90
CASE = Case((2, N, D), (2, N, D), (2, N, 5), mask="random")
KMEANS = {"landmarks": "kmeans"}
FIT = {"landmarks": "kmeans", "pinv": "ridge-fit"}


def nystrom(q: Any, k: Any, v: Any, key_mask: Any = None, **options: Any) -> Any:
    return subquad.attention(q, k, v, "nystrom", key_mask=key_mask, **options)


def drawn(case: Case = CASE) -> list[Any]:
    return list(case.draw().values())


def error(out: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("m", [64, 128])
def test_errors_on_real_activations(m: int) -> None:
    """64 landmarks: 0.470 with segment means, 0.416 with k-means, 0.275 fitted; with the means of clusters alone 0.305."""
    sample = read_sample()
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (sample.q, sample.k, sample.v))
    exact = subquad.attention(q, k, v, "exact")
    segments, clusters, fitted = (error(nystrom(q, k, v, num_landmarks=m, **x), exact) for x in ({}, KMEANS, FIT))
    assert clusters < 0.9 * segments
    assert fitted < 0.6 * segments
    assert fitted < clusters


def test_every_option_has_an_effect() -> None:
    """On more rows than a sample has; without an effect there is an error (test_errors)."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 300, D))
    mask = np.arange(300) % 7 > 0
    for options in (KMEANS, FIT):
        base = nystrom(q, k, v, mask, num_landmarks=7, **options)
        assert np.array_equal(base, nystrom(q, k, v, mask, num_landmarks=7, seed=0, kmeans_iterations=5, **options))
        for change in (
            {"seed": 1},
            {"kmeans_iterations": 1},
            {"num_landmarks": 8},
            {"query_mask": np.arange(300) > 99},
        ):
            assert relative_error(nystrom(q, k, v, mask, **{"num_landmarks": 7, **options, **change}), base) > 1e-6
    assert relative_error(nystrom(q, k, v, mask, num_landmarks=7, ridge=0.5, **FIT), base) > 1e-6


def test_all_rows_are_the_sample_where_they_are_few() -> None:
    """With n ≤ 8 m, no row is left to chance."""
    q, k, v, _ = drawn()
    one, other = (nystrom(q, k, v, num_landmarks=12, seed=seed, **FIT) for seed in (0, 1))
    assert np.array_equal(one, other)
    one, other = (nystrom(q, k, v, num_landmarks=8, seed=seed, **FIT) for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_clusters_say_how_keys_and_values_vary_inside_them() -> None:
    """Their variance inside clusters and that of the means of clusters are the variance of all, and covariances too.

    Far from 0, where squares alone would lose all digits, and on more rows than a block has.
    """
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((3000, 4)) + 1e5, rng.standard_normal((3000, 3))
    mask = np.arange(3000) % 3 > 0
    found = find_clusters(xp, k, mask, 6, iterations=2, seed=0, values=v)
    spread = (found.counts * (found.spreads + (found.means - k[mask].mean(axis=0)) ** 2)).sum(axis=0) / mask.sum()
    assert relative_error(spread, k[mask].var(axis=0)) < 1e-9
    between = found.counts * (found.means - k[mask].mean(axis=0))
    total = found.slopes + between.T @ found.values / mask.sum()
    assert relative_error(total, (k[mask] - k[mask].mean(axis=0)).T @ v[mask] / mask.sum()) < 1e-6


# The kernel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["auto", "generic"])
@pytest.mark.parametrize("n", [0, 1, 63, 2500])
def test_each_row_is_in_the_sums_of_its_nearest_centre(n: int, implementation: str) -> None:
    """Far from 0, with centres that coincide, and rows that are hidden or not finite; 2500 rows are several parts."""
    rng = np.random.default_rng(0)
    x, centres, values = rng.standard_normal((n, 5)) + 1000, rng.standard_normal((7, 5)) + 1000, rng.random((n, 2))
    centres[4] = centres[2]
    mask = np.arange(n) % 5 > 0
    x[7::11, 2], x[8::11, 0] = np.nan, -np.inf
    index, count, total, summed = nearest(x, centres, values, key_mask=mask, implementation=implementation)
    own = np.nan_to_num(((x[:, None] - centres) ** 2).sum(axis=-1), posinf=0).argmin(axis=1)
    own[~mask | ~np.isfinite(x).all(axis=1)] = -1
    assert np.array_equal(index, own)
    assert 4 not in own
    for c in range(7):
        assert count[c] == (own == c).sum()
        assert np.allclose(total[c], x[own == c].sum(axis=0), rtol=1e-13)
        assert np.allclose(summed[c], values[own == c].sum(axis=0), rtol=1e-13)
    assert len(nearest(x, centres, None)) == 3


@pytest.mark.parametrize("implementation", ["generic", "auto"])
def test_centres_may_have_a_sum_beyond_the_range(implementation: str) -> None:
    """All have one large number in common, from which none is far."""
    rng = np.random.default_rng(0)
    x, centres = rng.standard_normal((200, 4)), rng.standard_normal((8, 4))
    x[:, 1] = centres[:, 1] = 0
    expected, *_ = nearest(x, centres, None, implementation=implementation)
    x[:, 1] = centres[:, 1] = 0.75 * np.finfo(np.float64).max
    with np.errstate(over="ignore"):  # of the sums of rows
        index, *_ = nearest(x, centres, None, implementation=implementation)
    assert np.array_equal(index, expected)


def test_sums_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, centres = np.random.default_rng(0).standard_normal((5000, 64), dtype=np.float32), np.eye(64, dtype=np.float32)
    found = []
    for threads in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        found.append(nearest(x, centres, x))
    for one, two in zip(*found, strict=True):
        assert np.array_equal(one, two)


# Clusters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_few_kinds_are_found(masked: bool) -> None:
    """Eight kinds of rows in runs, sixteen clusters: each cluster has one kind, and counts are those of the kinds."""
    kinds = np.random.default_rng(0).standard_normal((8, 4)) + 3000  # far from 0, where squares alone lose digits
    x = np.repeat(kinds, 40, axis=0)
    mask = np.arange(320) % 2 == 0 if masked else None
    values = np.arange(320.0)[:, None]
    means, valid, counts, of_values, *_ = find_clusters(
        xp, x.astype(np.float32), mask, 16, iterations=3, seed=0, values=values.astype(np.float32),
        toward=np.ones((1, 4), dtype=np.float32),
    )  # fmt: skip
    assert valid is None or valid.all()
    own = counts[:, 0] > 0
    nearest = np.abs(means[:, None] - kinds).sum(axis=-1).argmin(axis=1)
    assert relative_error(means[own], kinds[nearest[own]]) < 1e-6
    total = np.bincount(nearest, counts[:, 0], minlength=8)
    assert np.array_equal(total, np.full(8, 20 if masked else 40))
    middle = np.arange(8) * 40 + (19 if masked else 19.5)
    weighted = np.bincount(nearest, counts[:, 0] * of_values[:, 0], minlength=8) / total
    assert np.allclose(weighted, middle)


@pytest.mark.parametrize("ridge", [None, 1e-3, 1e3])
def test_keys_of_few_kinds_are_exact(eager: Library, ridge: float | None) -> None:
    """The clusters then lose nothing, whatever their values are fitted with."""
    rng = np.random.default_rng(0)
    q, v = rng.standard_normal((2, 320, 4)), rng.standard_normal((2, 320, 3))
    k = np.repeat(rng.standard_normal((2, 8, 4)), 40, axis=1)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return nystrom(q, k, v, num_landmarks=16, ridge=ridge, **FIT)

    out = eager.numpy(eager.call(attend, q, k, v, dtype="float64"))
    assert relative_error(out, subquad.attention(q, k, v, "exact")) < 1e-12


def test_the_key_that_all_attend_to_has_a_cluster_of_its_own() -> None:
    """It is one of 2000 keys and near their mean: no other choice of first centres would find it."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((2000, 16))
    k[1234] = 0
    k[:, 0] -= 8  # every query dislikes the others
    k[1234, 0] = 0
    means, _, counts, *_ = find_clusters(xp, k, None, 16, iterations=5, seed=0, toward=np.eye(16)[:1])
    alone = np.abs(means - k[1234]).max(axis=-1) < 1e-12
    assert counts[alone, 0].tolist() == [1]


@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_keys_begin_centres_where_most_of_the_attention_goes_to_them(strength: float) -> None:
    """Then the three keys nearest to the mean query are centres after no iteration but the last pass."""
    rng = np.random.default_rng(0)
    k, toward = rng.standard_normal((500, 4)), strength * np.ones((1, 4))
    order = np.argsort(-(k @ toward[0]))[:3]
    weights = np.exp(k @ toward[0])
    share = weights[order].sum() / weights.sum()
    found = [find_clusters(xp, k, None, 6, iterations=0, seed=0, **x) for x in (
        {}, {"toward": toward}, {"toward": toward, "share": 0.4})]  # fmt: skip
    assert (share > 0.4) == (strength == 3)
    assert relative_error(found[1].means, found[0].means) > 0.1
    assert np.array_equal(found[2].means, found[1 if strength == 3 else 0].means)


def test_equal_keys() -> None:
    """All but one cluster are empty, and divide nothing by 0."""
    q, v = np.random.default_rng(0).standard_normal((2, 50, 3))
    k = np.ones((50, 3))
    for options in (KMEANS, FIT):
        out = nystrom(q, k, v, num_landmarks=6, **options)
        assert relative_error(out, np.broadcast_to(v.mean(axis=0), (50, 3))) < 1e-10


@pytest.mark.parametrize("visible", [0, 1, 5, 6, 7])
def test_few_visible_keys_are_exact(eager: Library, visible: int) -> None:
    q, k, v, _ = drawn()
    mask = np.random.default_rng(3).permutation(N) < visible
    k, v = (np.where(mask[:, None], x, np.nan) for x in (k, v))
    exact = subquad.attention(q, k, v, "exact", key_mask=mask)
    for options in (KMEANS, FIT):
        got = eager.numpy(
            eager.call(lambda *x, o=options: nystrom(*x, num_landmarks=6, **o), q, k, v, mask, dtype="float64")
        )
        assert (relative_error(got, exact) < 1e-12) == (visible <= 6)


@pytest.mark.parametrize("options", [KMEANS, FIT], ids=["kmeans", "ridge-fit"])
def test_a_query_that_is_not_finite_spoils_its_own_row(eager: Library, options: dict[str, Any]) -> None:
    q, k, v, _ = drawn()
    for bad in (np.nan, np.inf):
        dirty = q.copy()
        dirty[0, 17, 3] = bad
        out = eager.numpy(eager.call(lambda *x: nystrom(*x, num_landmarks=6, **options), dirty, k, v, dtype="float64"))
        assert np.all(np.isfinite(np.delete(out[0], 17, axis=0)))
        assert bad == np.inf or np.all(np.isnan(out[0, 17]))
        assert relative_error(out[1], nystrom(q, k, v, num_landmarks=6, **options)[1]) < 1e-12


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("options", [KMEANS, FIT], ids=["kmeans", "ridge-fit"])
def test_a_visible_key_that_is_not_finite_is_not_lost(name: str, options: dict[str, Any]) -> None:
    given = dict(zip("qkv", drawn()[:3], strict=True))
    given[name] = given[name].copy()
    given[name][0, 5] = np.nan
    out = nystrom(**given, num_landmarks=6, **options)
    assert np.all(np.isnan(out[0]))
    assert np.all(np.isfinite(out[1]))


# The fit --------------------------------------------------------------------------------------------------------------


def test_lambda_is_chosen_for_each_head() -> None:
    """The output of each head is that of one λ of the list, and not of one for all."""
    q, k, v, _ = drawn(Case((5, N, D), (5, N, D), (5, N, 5)))
    q[0], q[1] = 10 * q[0], q[1] / 10
    auto = nystrom(q, k, v, num_landmarks=8, **FIT)
    given = [nystrom(q, k, v, num_landmarks=8, ridge=x, **FIT) for x in LAMBDAS]
    found = [[i for i, out in enumerate(given) if relative_error(out[head], auto[head]) < 1e-12] for head in range(5)]
    assert all(len(x) == 1 for x in found)
    assert len({x[0] for x in found}) > 1


def test_a_small_lambda_interpolates_and_a_large_one_summarises() -> None:
    """At the landmark queries: exact; everywhere: attention to the clusters, and the slope inside them."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((8, D))
    q = np.repeat(rows, 20, axis=0)  # the landmarks of queries are these eight
    k, v = rng.standard_normal((160, D)), rng.standard_normal((160, 3))
    exact = subquad.attention(q, k, v, "exact")
    assert error(nystrom(q, k, v, num_landmarks=8, ridge=1e-12, **FIT), exact) < 1e-6
    summary = nystrom(q, k, v, num_landmarks=8, ridge=1e12, **FIT)
    means, _, counts, values, spreads, slopes = find_clusters(
        xp, k, None, 8, iterations=5, seed=0, values=v, toward=q.mean(axis=0, keepdims=True) * D**-0.5
    )
    weights = np.exp(D**-0.5 * q @ means.T + q**2 @ spreads.T / (2 * D)) * counts[:, 0]
    expected = weights @ values / weights.sum(axis=1, keepdims=True) + D**-0.5 * q @ slopes
    assert error(expected, summary) < 1e-10
    assert error(summary, exact) > 0.01


def test_a_cluster_without_keys_takes_nothing_from_the_others() -> None:
    """Though the query is so near its centre that what the others weigh beside it underflows."""
    found = Clusters(np.array([[0.0], [100.0]]), None, np.array([[5.0], [0.0]]), np.array([[3.0], [0.0]]))
    q = np.array([[10.0]])
    assert read_values(xp, q, found, Fit(found.values, np.zeros((1, 1))), scale=1.0) == 3
    fitted = fit_values(xp, q, None, found, np.array([[4.0]]), scale=1.0, ridge=1e-9)
    assert np.allclose(fitted.values, [[4.0], [0.0]])
    assert fitted.slope == 0


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_fit_is_a_ridge_regression_whatever_the_number_of_rows(rows: int) -> None:
    rng = np.random.default_rng(0)
    q, means, targets = (rng.standard_normal(shape) for shape in ((rows, D), (3, D), (rows, 2)))
    counts, values = np.array([[5.0], [2.0], [4.0]]), rng.standard_normal((3, 2))
    F = np.exp(q @ means.T) * counts[:, 0]
    F = F / F.sum(axis=1, keepdims=True)
    off = q - q.mean(axis=0)
    both = np.concatenate([F, off], axis=1)
    strength = 0.1 * np.diag(np.repeat([np.sum(F * F) / 3, np.sum(off * off) / D], [3, D]))
    found = np.linalg.solve(both.T @ both + strength, both.T @ (targets - F @ values))
    fitted = fit_values(xp, q, None, Clusters(means, None, counts, values), targets, scale=1.0, ridge=0.1)
    assert relative_error(fitted.values, values + found[:3] - q.mean(axis=0) @ found[3:]) < 1e-12
    assert relative_error(fitted.slope, found[3:]) < 1e-12


@pytest.mark.parametrize("visible", [0, 1, 3, 5])
def test_few_queries_are_landmarks_as_they_are(visible: int) -> None:
    """Those that are hidden, and landmarks that stand for no query, do not enter the fit."""
    q, k, v, _ = drawn()
    query_mask = np.arange(N) % 17 < 1
    query_mask &= np.cumsum(query_mask) <= visible
    for options in (KMEANS, FIT):
        out = nystrom(q, k, v, num_landmarks=7, query_mask=query_mask, **options)
        if visible == 0 and options is KMEANS:
            continue  # no landmark at all
        reference = definitions.over_heads(
            definitions.nystrom, q, k, v, None, num_landmarks=7, query_mask=query_mask, **options
        )
        assert relative_error(out, reference) < 1e-12


def test_float32_keeps_its_digits_with_the_smallest_lambda() -> None:
    """FᵀF squares a condition number of √(m/λ); refined, the output has the digits of the inputs all the same."""
    q, k, v, _ = drawn(Case((3, 400, D), (3, 400, D), (3, 400, 5)))
    single = [x.astype(np.float32) for x in (q, k, v)]
    double = [x.astype(np.float64) for x in single]
    got, expected = (nystrom(*x, num_landmarks=32, ridge=1e-5, **FIT) for x in (single, double))
    assert relative_error(got, expected) < 2e-5


def test_memory_does_not_grow_with_the_length_but_by_some_numbers_a_key() -> None:
    """Beyond the output: one logit, its place in their order, and copies of both; not m numbers a key."""
    peaks = []
    for n in (2**14, 2**16):
        q = np.random.default_rng(0).standard_normal((n, 16), dtype=np.float32)
        nystrom(q[:400], q[:400], q[:400], num_landmarks=64, **FIT)
        tracemalloc.start()
        nystrom(q, q, q, num_landmarks=64, **FIT)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    per_row = (peaks[1] - peaks[0]) / (2**16 - 2**14)
    assert per_row < 16 * 4 + 64  # the output has 16 numbers of 4 bytes a row; one for each landmark would be 256 bytes


@pytest.mark.parametrize("options", [KMEANS, FIT], ids=["kmeans", "ridge-fit"])
def test_gradients_reach_queries_keys_and_values(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (Torch().array(x / 2, "float64").requires_grad_() for x in drawn(Case((40, D), (50, D), (50, 2)))[:3])
    mask = torch.arange(50) % 7 > 0

    def attend(q: Any, k: Any, v: Any) -> Any:
        return nystrom(q, k, v, mask, num_landmarks=5, **options)

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)
    attend(q, k, v).sin().sum().backward()
    for x in (q, k, v):
        assert bool((x.grad != 0).any(dim=-1)[: len(x)].sum() >= 40)


def test_repr_shows_what_is_in_force() -> None:
    assert repr(subquad.Nystrom(**KMEANS)) == (
        "Nystrom(num_landmarks=64, landmarks='kmeans', seed=0, kmeans_iterations=5, pinv='iterative', iterations=6)"
    )
    assert repr(subquad.Nystrom(**FIT, ridge=0.5)) == (
        "Nystrom(num_landmarks=64, landmarks='kmeans', seed=0, kmeans_iterations=5, pinv='ridge-fit', ridge=0.5)"
    )
    assert "ridge=" not in repr(subquad.Nystrom(**FIT)).replace("'ridge-fit'", "")
