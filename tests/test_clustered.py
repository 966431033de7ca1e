"""Clustered attention: exact when all clusters are opened, a convex combination of values always, and better the more
clusters are opened."""

from __future__ import annotations

import importlib.resources
import itertools
import pickle
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows.libraries import Library, relative_error
from rows.methods import CASES, Case, D

import subquad
from subquad.attention import cluster_spans, key_clusters
from subquad.attention.call import enter
from subquad.attention.cluster_spans import span_of
from subquad.attention.key_clusters import spread_of
from subquad.cli.inputs import read_npz, read_sample
from subquad.core import loading
from subquad.kernels.balanced_tree import balanced_tree
from subquad.kernels.clustered_attention import band_sums, bands_of, clustered_attention

MINILM = Path(__file__).with_name("data") / "minilm.npz"
N = 150
SMALL = {"cluster_size": 4, "opened": 2, "chunk": 16, "sinks": 3, "window": 2, "spans": 2}
GROUPED = SMALL | {"cluster_size": 2, "chunk": 32, "expanded": 3}  # groups of four clusters
both_forms = pytest.mark.parametrize("causal", [False, True])


def drawn(n: int = N, n_kv: int = 0, batch: tuple[int, ...] = (2, 3)) -> list[np.ndarray]:
    case = Case((*batch, n, D), (*batch, n_kv or n, D), (*batch, n_kv or n, 3))
    return [case.draw()[name] for name in ("q", "k", "v")]


def attend(*qkv: Any, **options: Any) -> Any:
    return subquad.attention(*qkv, "clustered", **{**SMALL, **options})


@both_forms
@pytest.mark.parametrize("shape", [(N, N), (40, N), (N, 40)])
@pytest.mark.parametrize("size", [1, 4, 7, 1000])
def test_every_cluster_opened_is_exact(size: int, shape: tuple[int, int], causal: bool) -> None:
    q, k, v = drawn(*shape)
    mask = np.random.default_rng(0).random((2, 1, shape[1])) < 0.7
    for key_mask in (None, mask):
        got = attend(q, k, v, causal=causal, key_mask=key_mask, cluster_size=size, opened=10**6)
        assert relative_error(got, subquad.attention(q, k, v, "exact", causal=causal, key_mask=key_mask)) < 1e-12


@both_forms
def test_clusters_of_one_key_are_exact(causal: bool) -> None:
    """The centroid of one key is the key, and its spread is 0."""
    q, k, v = drawn()
    for opened in (0, 3):
        got = attend(q, k, v, causal=causal, cluster_size=1, opened=opened)
        assert relative_error(got, subquad.attention(q, k, v, "exact", causal=causal)) < 1e-12


@pytest.mark.parametrize("implementation", ["generic", "compiled"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_keys_that_are_not_finite_stay_before_hidden_ones(bad: float, implementation: str) -> None:
    """They take places of clusters like other visible keys: no hidden one comes before them."""
    rng = np.random.default_rng(0)
    x, sketch, seen = rng.standard_normal((300, 5)), rng.standard_normal((5, 32)), rng.random(300) < 0.8
    x[rng.integers(0, 300, 9), 0] = bad
    with np.errstate(all="ignore"):
        order = np.asarray(balanced_tree(x, sketch, size=8, key_mask=seen, implementation=implementation))
    assert np.array_equal(np.sort(order[: seen.sum()]), np.flatnonzero(seen))


@pytest.mark.parametrize("n", [63, 64, 65, 700, 2100])
def test_compiled_clusters_are_those_of_the_definition(n: int) -> None:
    """Also where keys are equal, where sets are sorted in several runs, and where all is one key."""
    rng = np.random.default_rng(0)
    sketch, drawn = rng.standard_normal((8, 32)), rng.standard_normal((n, 8))
    for x in (drawn, drawn[rng.integers(0, 2, n)], drawn[rng.integers(0, n // 9, n)], drawn[:1] + np.zeros((n, 1))):
        orders = [np.asarray(balanced_tree(x, sketch, size=16, implementation=y)) for y in ("generic", "compiled")]
        clusters = [np.sort(order[: n // 16 * 16].reshape(-1, 16), axis=-1) for order in orders]
        assert (
            np.mean(clusters[0] == clusters[1]) > 0.97
        )  # where projections are equal but for rounding, they may differ


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_row_is_in_one_cluster(dtype: Any) -> None:
    """Also where projections are equal, or differ by a rounding."""
    pytest.importorskip("llvmlite")
    rng = np.random.default_rng(0)
    for n, d, size in ((1, 3, 2), (595, 17, 5), (256, 16, 2), (683, 70, 32), (300, 64, 1), (1024, 64, 16)):
        drawn, sketch = rng.standard_normal((n, d)).astype(dtype), rng.standard_normal((d, 32)).astype(dtype)
        for x in (drawn, drawn * dtype(1e-30), np.rint(drawn), np.rint(drawn * 8) / 3):
            for mask in (None, rng.random(n) < 0.7):
                order = np.asarray(balanced_tree(x, sketch, size=size, key_mask=mask, implementation="compiled"))
                assert np.array_equal(np.sort(order[:n]), np.arange(n)), (n, d, size)
                seen = n if mask is None else int(mask.sum())
                assert mask is None or np.array_equal(np.sort(order[:seen]), np.flatnonzero(mask))


@pytest.mark.parametrize("library", ["numpy", "jax"])
def test_threads_that_share_a_tree_find_the_same_clusters(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large sets are split by one thread, and their halves by several."""
    calls, launch = (pytest.importorskip(f"subquad_numpy.clustered.{name}") for name in ("calls", "launch"))
    xp, rng, found = pytest.importorskip({"numpy": "numpy", "jax": "jax.numpy"}[library]), np.random.default_rng(0), []
    x, sketch, mask = rng.standard_normal((2**14, 16)), rng.standard_normal((16, 32)), rng.random(2**14) < 0.9
    given = [xp.asarray(y) for y in (x.astype(np.float32), sketch.astype(np.float32), mask)]
    for threads in ("1", "2", "4"):
        for module in (calls, launch):
            monkeypatch.setattr(
                module, "thread_count" if module is calls else "threads_for", lambda _, x=threads: int(x)
            )
        order = balanced_tree(*given[:2], size=16, key_mask=given[2], implementation="compiled")
        found.append(np.asarray(order))
        assert np.array_equal(np.sort(found[-1]), np.arange(2**14))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    assert calls.tree_runs(2**14, 16, 1, 4) == [(1, 2**13), (2, 2**12), (4, 16)]
    assert calls.tree_runs(2**14, 16, 4, 4) == calls.tree_runs(2**14 - 1, 16, 1, 4) == [(1, 16)]


@both_forms
@pytest.mark.parametrize("options", [SMALL | {"opened": 0}, SMALL, GROUPED], ids=("closed", "opened", "grouped"))
def test_every_key_counts_once(options: dict[str, Any], causal: bool) -> None:
    """Where all keys are equal, exp(lse) is their number times one exponential: near, opened, in a centroid or group."""
    q, k, _ = drawn(batch=())
    mask = np.random.default_rng(0).random(N) < 0.7
    given = q, k[:1] + np.zeros_like(k), np.eye(N)
    weights, lse = attend(*given, causal=causal, key_mask=mask, return_lse=True, **options)
    want = subquad.attention(*given, "exact", causal=causal, key_mask=mask, return_lse=True)
    seen = np.isfinite(want[1])
    assert relative_error(lse[seen], want[1][seen]) < 1e-12
    assert np.max(np.abs(weights.sum(axis=1) - seen)) < 1e-12
    assert np.all(weights[:, ~mask] == 0)
    # a centroid spreads the weight of the keys that are left of it over all its keys, near ones too
    assert not causal or relative_error(weights, want[0]) < 1e-12


@both_forms
@pytest.mark.parametrize("options", [SMALL, GROUPED], ids=("clusters", "groups"))
def test_outputs_are_convex_combinations(options: dict[str, Any], causal: bool) -> None:
    """Also where logits are large, of either sign, and far apart."""
    q, k, v = drawn()
    for factor in (1, 30, -1e3):
        out = attend(factor * q, k, v, causal=causal, **options)
        low, high = v.min(axis=-2, keepdims=True), v.max(axis=-2, keepdims=True)
        room = 1e-12 * np.abs(v).max()
        assert np.all((out >= low - room) & (out <= high + room))


@pytest.mark.parametrize("implementation", ["generic", "compiled"])
@pytest.mark.parametrize("exponent", [-100, -30, 10, 20, 60, 120])
def test_clusters_do_not_depend_on_the_unit_of_keys(exponent: int, implementation: str) -> None:
    """A power of two changes no digit, and the sixth powers that the search for a direction takes do not overflow."""
    rng = np.random.default_rng(0)
    x, sketch = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 100, D), (D, 32)))
    orders = [balanced_tree(y, sketch, size=4, implementation=implementation) for y in (x, x * 2.0**exponent)]
    assert np.array_equal(*orders)
    assert not np.array_equal(np.sort(orders[0][0]), orders[0][0])


@both_forms
@pytest.mark.parametrize("options", [SMALL | {"opened": 0}, SMALL, GROUPED], ids=("closed", "opened", "grouped"))
@pytest.mark.parametrize("implementation", ["generic", "auto"])
@pytest.mark.parametrize("size", [1e9, 1e18, 1e19, 1e36])
def test_large_logits_have_finite_weights(
    size: float, implementation: str, options: dict[str, Any], causal: bool
) -> None:
    """Also where the square of a logit, of a query, or of a key is beyond the range of the dtype."""
    q, k, v = (x.astype(np.float32) for x in drawn())
    k[..., 0] = 0  # no spread in a channel: 0 · ∞ is NaN
    large = np.float32(size)
    with np.errstate(all="ignore"):
        for given in ((q * large, k / 64, v), (q / 64, k * large, v), (q * large**0.5, k * large**0.5, v)):
            out = attend(*given, causal=causal, implementation=implementation, **options)
            assert np.all(out <= v.max(axis=-2, keepdims=True) + 1e-5)
            assert np.all(out >= v.min(axis=-2, keepdims=True) - 1e-5)


@both_forms
def test_lse_is_that_of_all_weights(causal: bool) -> None:
    """Halves of the keys, joined by their log-sum-exps, are the whole."""
    q, k, v = drawn()
    out, lse = attend(q, k, v, causal=causal, opened=10**6, return_lse=True)
    want = subquad.attention(q, k, v, "exact", causal=causal, return_lse=True)
    assert relative_error(lse, want[1]) < 1e-12
    if not causal:
        parts = [attend(q, k[..., x, :], v[..., x, :], return_lse=True) for x in (slice(80), slice(80, None))]
        level = np.logaddexp(parts[0][1], parts[1][1])
        joined = sum(y * np.exp(z - level)[..., None] for y, z in parts)
        near_exact = np.linalg.norm(joined - out) / np.linalg.norm(out)
        assert near_exact < 2 * max(np.linalg.norm(attend(q, k, v) - out) / np.linalg.norm(out), 1e-3)


@both_forms
def test_groups_are_read_as_centroids_or_expanded(causal: bool) -> None:
    """With all of them expanded there are none; the fewer are, the larger is the error, but it is not that of no keys."""
    q, k, v = sample()
    exact = subquad.attention(q, k, v, "exact", causal=causal)

    def error(**options: Any) -> float:
        out = subquad.attention(q, k, v, "clustered", cluster_size=4, chunk=64, opened=8, causal=causal, **options)
        return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))

    errors = [error(expanded=expanded) for expanded in (0, 8, 24, 10**6)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[2] < 1.5 * errors[3]
    assert errors[0] < 0.5


@pytest.mark.parametrize("implementation", ["generic", "compiled"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25])
def test_kernel_follows_its_definition(share: float, implementation: str) -> None:
    """Row by row: groups of the largest weight are expanded, clusters of the largest weight are opened.

    With a share, those that have it of the weight of all but the first cluster, and of other keys.
    """
    rng = np.random.default_rng(0)
    n, clusters, size, group, opened, expanded, scale = 40, 14, 3, 4, 3, 1, 0.7
    k, v = rng.standard_normal((2, clusters, size, D))
    q, stop = rng.standard_normal((n, D)), rng.integers(0, clusters + 1, n)
    means, values = k.mean(axis=1), v.mean(axis=1)
    spread, of_spread = (rng.random((x, D + bands_of(D))) for x in (clusters, 3))
    members = [x[1:13].reshape(3, group * size, D) for x in (k, v)]  # cluster 0 is always opened, 13 has no group
    of_groups = members[0].mean(axis=1), of_spread, members[1].mean(axis=1)
    columns = np.swapaxes(k, 1, 2).reshape(clusters * D, size)
    counts = np.full(clusters, size, dtype=np.int32)
    other, of_other = rng.standard_normal((n, D)), rng.standard_normal(n) + 2
    out, lse = clustered_attention(
        q, columns, v.reshape(-1, D), None, means, spread, values, counts, *of_groups, stop.astype(np.int32), None, None,
        other, of_other, scale=scale, opened=opened, always=1, group=group, expanded=expanded, share=share,
        implementation=implementation,
    )  # fmt: skip
    numbers = set()

    def weight(x: np.ndarray, mean: np.ndarray, spread: np.ndarray, count: int) -> float:
        width = -(-D // bands_of(D))
        bands = [(x[i : i + width] ** 2).sum() for i in range(0, D, width)]
        return float(x @ mean + ((x @ spread[:D]) ** 2 + bands @ spread[D:]) / 4 + np.log(count))

    for i in range(n):
        x, seen = q[i] * scale, int(stop[i])
        whole = [g for g in range(3) if 1 + (g + 1) * group <= seen]
        ranked = sorted(whole, key=lambda g: -weight(x, *(y[g] for y in of_groups[:2]), group * size))
        closed_groups = ranked[expanded:]
        shown = [c for c in range(seen) if not (1 <= c < 13 and (c - 1) // group in closed_groups)]
        of = {c: weight(x, means[c], spread[c], size) for c in shown}
        far = sorted((c for c in shown if c > 0), key=lambda c: -of[c])
        of_closed = [weight(x, *(y[g] for y in of_groups[:2]), group * size) for g in closed_groups]
        least = share * np.exp([*(of[c] for c in far), *of_closed, of_other[i]]).sum()
        chosen = [c for c in far[:opened] if np.exp(of[c]) >= least]
        numbers.add(len(chosen))
        read = [c for c in shown if c == 0 or c in chosen]
        terms = [(float(x @ k[c, j]), v[c, j]) for c in read for j in range(size)]
        terms += [(of[c], values[c]) for c in shown if c not in read]
        terms += [(w, of_groups[2][g]) for w, g in zip(of_closed, closed_groups, strict=True)]
        terms += [(of_other[i], other[i])]
        total = sum(np.exp(w) for w, _ in terms)
        expected = sum((np.exp(w) * y for w, y in terms), np.zeros(D)) / total
        assert np.allclose(out[i], expected, rtol=0, atol=1e-13)
        assert np.isclose(lse[i], np.log(total))
    assert len(numbers) > 2


@both_forms
def test_a_larger_share_opens_fewer_clusters(causal: bool) -> None:
    q, k, v = sample()
    exact = subquad.attention(q, k, v, "exact", causal=causal)

    def error(**options: Any) -> float:
        out = subquad.attention(q, k, v, "clustered", chunk=64, causal=causal, **options)
        return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))

    errors = [error(opened=48, share=share) for share in (0.0, 0.003, 0.02, 0.99)]
    assert all(earlier < later for earlier, later in itertools.pairwise(errors))
    assert errors[0] == error(opened=48)
    assert errors[-1] == error(opened=0)


@pytest.mark.parametrize("opened", [2, 16, 60])
def test_means_that_are_not_finite_are_opened_within_the_room_of_a_row(opened: int) -> None:
    """NaN compares with nothing: neither it nor what is ranked beside it may take more than `opened` places."""
    rng = np.random.default_rng(0)
    n, clusters = 256, 240
    q, k, v = (rng.standard_normal((x, D)) for x in (n, clusters, clusters))
    q[:, 0], k[:, 0] = 1, np.linspace(0, 9, clusters)
    k[120::2] = np.nan
    stop = np.where(np.arange(n) % 2 == 0, 120, clusters).astype(np.int32)

    def attend(k: np.ndarray, implementation: str) -> np.ndarray:
        spread, counts = np.zeros((clusters, D + bands_of(D))), np.ones(clusters, dtype=np.int32)
        given = q, k.reshape(-1, 1), v, None, k, spread, v, counts, None, None, None, stop, *[None] * 4
        return clustered_attention(*given, scale=1.0, opened=opened, implementation=implementation)[0]

    clean = attend(np.where(np.isnan(k), 0.0, k), "generic")
    for implementation in ("generic", "compiled"):
        out = attend(k, implementation)
        assert relative_error(out[::2], clean[::2]) < 1e-13
        assert np.all(np.isnan(out[1::2]))


@both_forms
def test_error_falls_with_opened_clusters_on_real_keys(causal: bool) -> None:
    q, k, v = sample()
    exact = subquad.attention(q, k, v, "exact", causal=causal)
    errors = []
    for opened in (0, 4, 16, 32):
        out = subquad.attention(q, k, v, "clustered", opened=opened, chunk=128, causal=causal)
        errors.append(float(np.linalg.norm(out - exact) / np.linalg.norm(exact)))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[2] < (0.01 if causal else 0.05)


def sample(n: int = 768) -> list[np.ndarray]:
    file = importlib.resources.files("subquad") / "data" / "sample.npz"
    if not file.is_file():
        pytest.skip("no sample data in this installation")
    with file.open("rb") as opened, np.load(opened) as stored:
        return [stored[name][:, :n].astype(float) for name in ("q", "k", "v")]


def test_clusters_follow_content_and_not_places() -> None:
    """Shuffled keys have the same clusters, unless there are near keys or sinks."""
    q, k, v = drawn(batch=())
    order = np.random.default_rng(0).permutation(N)
    bare = {"window": 0, "sinks": 0, "opened": 2}
    # windows of no reach still hold the key at the place of a row: more queries than keys have none
    q = np.concatenate([q, np.zeros((N, D))])
    one, other = (attend(q, k[x], v[x], **bare)[:N] for x in (np.arange(N), order))
    assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("options", [SMALL, GROUPED], ids=("clusters", "groups"))
def test_later_queries_and_tokens_move_no_bit(options: dict[str, Any]) -> None:
    """The metric of a chunk knows the queries up to its end."""
    q, k, v = drawn()
    out = attend(q, k, v, causal=True, **options)
    for cut in (16, 33, 100):
        changed = [np.concatenate([x[..., :cut, :], y], axis=-2) for x in (q, k, v)
                   for y in (np.full((*x.shape[:-2], N - cut, x.shape[-1]), np.nan),)]  # fmt: skip
        with np.errstate(all="ignore"):
            got = attend(*changed, causal=True, **options, implementation="generic")
        want = attend(q, k, v, causal=True, **options, implementation="generic")
        assert np.array_equal(got[..., :cut, :], want[..., :cut, :])
        assert np.all(np.isnan(got[..., cut:, :]))
    assert relative_error(out, want) < 1e-12


def test_queries_shape_the_clusters() -> None:
    """Queries that read one channel alone make clusters by it: their means leave nothing to open."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 256, D))
    q *= np.where(np.arange(D) == 2, 3.0, 1e-3)
    k *= np.where(np.arange(D) == 2, 1.0, 4.0)
    v = np.tanh(k[:, 2:3]) + np.zeros((256, 2))
    options = {"opened": 0, "window": 0, "sinks": 0, "cluster_size": 16}
    exact = subquad.attention(q, k, v, "exact")
    others = np.concatenate([q, 1e3 * rng.standard_normal((256, D))])  # rows whose queries spread the other way
    good, bad = attend(q, k, v, **options), attend(others, np.concatenate([k, k]), np.concatenate([v, v]), **options)
    assert relative_error(good, exact) < 0.2 * relative_error(bad[:256], exact)
    errors = [relative_error(attend(q, k, v, power=power, **options), exact) for power in (0.0, 0.25, 0.5)]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


@both_forms
def test_powers_of_the_second_moment(causal: bool) -> None:
    """0.25 is the default; where Σ is a multiple of I, all powers make the clusters that 0 makes, but no others."""
    q, k, v = drawn()
    assert np.array_equal(attend(q, k, v, causal=causal, power=0.25), attend(q, k, v, causal=causal))
    even = np.concatenate([np.eye(D), -np.eye(D)])
    for queries, same in ((even, True), (even * np.arange(1, D + 1), False)):
        outs = [attend(queries, k, v, power=power) for power in (0.0, 0.1, 0.5)]
        assert all((relative_error(out, outs[0]) < 1e-12) == same for out in outs[1:])


@pytest.mark.parametrize("name", ["power", "share"])
@pytest.mark.parametrize("value", ["0.3", None, True])
def test_numbers_of_another_type(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        subquad.Clustered(**{name: value})


@pytest.mark.parametrize("garbage", [1e3, np.nan])
@both_forms
def test_queries_at_hidden_places_do_not_count(causal: bool, garbage: float) -> None:
    q, k, v = drawn()
    mask = np.arange(N) % 5 > 0
    want = attend(q, k, v, causal=causal, key_mask=mask)
    dirty = [np.where(mask[:, None], x, garbage) for x in (q, k, v)]
    with np.errstate(all="ignore"):
        got = attend(*dirty, causal=causal, key_mask=mask)
    assert relative_error(got[..., mask, :], want[..., mask, :]) < 1e-12


@pytest.mark.parametrize("value", [np.nan, np.inf])
@both_forms
def test_queries_that_are_not_finite_do_not_count(causal: bool, value: float) -> None:
    """Nor does a query of 0, which adds nothing to a moment."""
    outs = []
    for entry in (0.0, value):
        q, k, v = drawn()
        q[..., 7, :] = entry
        with np.errstate(all="ignore"):
            outs.append(np.delete(attend(q, k, v, causal=causal), 7, axis=-2))
    assert relative_error(outs[1], outs[0]) < 1e-12


def test_longer_spans_make_better_clusters() -> None:
    """Heads of a trained model: 32 chunks, clustered one by one, or again in spans of four and of sixteen."""
    x = read_sample()
    exact = subquad.attention(x.q, x.k, x.v, "exact", causal=True)
    options = {"chunk": 32, "cluster_size": 16, "sinks": 4}
    once, again = (attend(x.q, x.k, x.v, causal=True, spans=spans, opened=8, **options) for spans in (1, 4))
    assert relative_error(again, exact) < 0.8 * relative_error(once, exact)


@pytest.mark.parametrize(
    ("source", "causal", "most"), [("sample", False, 0.95), ("minilm", False, 0.95), ("sample", True, 1.0)]
)
def test_the_direction_of_a_cluster_tells_more_than_its_channels(
    source: str, causal: bool, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of trained models: with nothing but the variance of each channel, a band for each, errors are larger."""
    x = read_sample() if source == "sample" else read_npz(MINILM)
    exact = subquad.attention(x.q, x.k, x.v, "exact", causal=causal)

    def errors() -> np.ndarray:
        method = subquad.Clustered(chunk=64, opened=8, implementation="generic")
        out = subquad.attention(x.q, x.k, x.v, method, causal=causal)
        return np.linalg.norm(out - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))

    def of_channels(xp: Any, far: Any, share: Any, *_: Any) -> Any:
        variances = xp.sum(far * far * share, axis=-2)
        return xp.concat([xp.zeros_like(variances), variances], axis=-1)

    found = errors()
    monkeypatch.setattr(sys.modules["subquad.kernels.clustered_attention"], "BANDS", x.q.shape[-1])
    for module in (key_clusters, sys.modules["subquad.kernels.cluster_summaries"]):
        monkeypatch.setattr(module, "spread_of", of_channels)
    before = errors()
    assert np.exp(np.mean(np.log(found / before))) < most
    assert np.max(found) < np.max(before)


def test_spread_tells_the_variance_along_one_direction() -> None:
    """Of keys on a line, for every query; of a single key, and of keys that are equal, it is 0."""
    rng = np.random.default_rng(0)
    line = rng.standard_normal((16, 1)) * rng.standard_normal(D)
    sight, share = np.ones(D), np.full((16, 1), 1 / 16)
    far = line - line.mean(axis=0)
    spread = spread_of(np, far, share, far, sight)
    assert spread.shape == (D + bands_of(D),)
    for q in rng.standard_normal((5, D)):
        assert np.isclose((q @ spread[:D]) ** 2, np.var(line @ q))
    assert np.allclose(spread[D:], 0, atol=1e-13)
    assert np.all(spread_of(np, 0 * far, share, 0 * far, sight) == 0)
    # the variances of all channels are kept, where each counts as the queries look at it
    far, sight = rng.standard_normal((16, D)) - 0.1, rng.random(D)
    far -= far.mean(axis=0)
    spread = spread_of(np, far, share, far, sight)
    left = (far**2).mean(axis=0) - spread[:D] ** 2
    assert np.all(left > 0)
    assert np.allclose(spread[D:], band_sums(np, left * sight) / band_sums(np, sight))


@pytest.mark.parametrize(
    ("chunk", "spans", "span"), [(1, 2, 0), (6, 2, 2), (8, 2, 8), (24, 2, 8), (8, 8, 8), (12, 8, 0), (5, 1, 0)]
)
def test_spans_are_powers(chunk: int, spans: int, span: int) -> None:
    assert span_of(chunk, spans) == span


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (3, 1)])
@pytest.mark.parametrize("numbers", [1, 2 * 512 * D])
def test_spans_of_items_one_by_one_are_those_of_all(
    batch: tuple[int, ...], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written into the clusters of all items, they are the same bit for bit; other items are not touched."""
    q, k, v = drawn(n=600, batch=batch)
    options: dict[str, Any] = {"causal": True, "chunk": 16, "spans": 4, "opened": 2, "cluster_size": 4}
    expected = attend(q, k, v, **options)
    monkeypatch.setattr(cluster_spans, "AT_ONCE", numbers)
    assert np.array_equal(attend(q, k, v, **options), expected)


def test_tensors_are_written_into_where_nothing_is_recorded() -> None:
    """With a gradient, clusters of spans are joined, and the output is that without one."""
    torch = pytest.importorskip("torch")
    backend = loading.backend_of(torch)
    plain = [torch.from_numpy(x) for x in drawn(n=300)]
    wanted = [x.clone().requires_grad_() for x in plain]
    assert backend.may_fill(*plain)
    assert not backend.may_fill(plain[0], wanted[1])
    with torch.no_grad():
        assert backend.may_fill(*wanted)
    assert not any(torch.vmap(lambda x: x * backend.may_fill(x))(plain[0]).flatten())
    options: dict[str, Any] = {"causal": True, "chunk": 16, "spans": 2, "opened": 2, "cluster_size": 4}
    found = attend(*wanted, **options)
    assert torch.allclose(found, attend(*plain, **options), rtol=0, atol=1e-12)
    assert all(bool(torch.any(x != 0)) for x in torch.autograd.grad(found.sum(), wanted))


def test_memory_is_as_large_as_a_budget_expects() -> None:
    """Few rows of many keys: most of it are the keys in the order of clusters."""
    pytest.importorskip("llvmlite")
    q, k, v = (np.random.default_rng(0).standard_normal((n, 64)) for n in (8, 2**17, 2**17))
    subquad.attention(q, k[:64], v[:64], "clustered")
    tracemalloc.start()
    out = subquad.attention(q, k, v, "clustered")
    peak = tracemalloc.get_traced_memory()[1] - out.nbytes
    tracemalloc.stop()
    call = enter(None, {"q": q, "k": k, "v": v}, causal=False, scale=None, owner=subquad.Clustered())
    assert 2 * k.nbytes < peak <= subquad.Clustered()._extra_bytes(call)


def test_memory_beyond_the_output_is_less_than_one_output() -> None:
    """Nine heads over three, as small language models have; long sequences, whose fixed parts do not count."""
    pytest.importorskip("llvmlite")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, 16384, 64), dtype=np.float32) for heads in (9, 3, 3))
    subquad.attention(q[:, :1024], k[:, :1024], v[:, :1024], "clustered", causal=True)
    tracemalloc.start()
    out = subquad.attention(q, k, v, "clustered", causal=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * out.nbytes


@both_forms
def test_heads_that_share_keys_share_their_clusters(causal: bool) -> None:
    """Copies of a query head change no cluster; another head beside it does."""
    q, k, v = drawn(batch=(2, 1))
    alone = attend(q, k, v, causal=causal)
    copies = attend(np.repeat(q, 3, axis=1), k, v, causal=causal)
    assert relative_error(copies, np.repeat(alone, 3, axis=1)) < 1e-12
    far = q * np.linspace(0, 5, D) ** 2
    pair = attend(np.concatenate([q, far], axis=1), k, v, causal=causal)
    assert relative_error(pair[:, :1], alone) > 1e-6
    masks = np.ones((2, 2, N), dtype=bool)  # one for each query head: keys of their own
    apart = attend(np.concatenate([q, far], axis=1), k, v, causal=causal, key_mask=masks)
    assert relative_error(apart[:, :1], alone) < 1e-12


@both_forms
def test_documents_are_as_if_alone(causal: bool) -> None:
    q, k, v = drawn()
    numbers = np.repeat([4, 0, 9], [60, 20, 70])
    together = attend(q, k, v, segments=numbers, causal=causal)
    for number in (4, 0, 9):
        own = numbers == number
        alone = attend(*(x[..., own, :] for x in (q, k, v)), causal=causal)
        assert relative_error(together[..., own, :], alone) < 1e-12


def test_seed_decides_and_is_the_only_chance() -> None:
    q, k, v = drawn()
    assert np.array_equal(attend(q, k, v, seed=1), attend(q, k, v, seed=1))
    # means of halves forget the first direction but for sets without a clear split: some clusters differ
    assert not np.array_equal(attend(q, k, v, seed=1), attend(q, k, v, seed=2))


@both_forms
def test_libraries_agree_in_double_precision(eager: Library, causal: bool) -> None:
    inputs = CASES["grouped"].draw()
    given = list(inputs.values())

    def call(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return attend(q, k, v, key_mask=mask, causal=causal, chunk=8)

    got = eager.numpy(eager.call(call, *given, dtype="float64"))
    assert relative_error(got, call(*given)) < 1e-12


@both_forms
def test_no_values_and_no_keys(causal: bool) -> None:
    q, k, v = drawn()
    assert attend(q, k, v[..., :0], causal=causal).shape == (2, 3, N, 0)
    hidden = attend(q, k, v, causal=causal, key_mask=np.zeros(N, dtype=bool), return_lse=True)
    assert np.all(hidden[0] == 0)
    assert np.all(hidden[1] == -np.inf)


@pytest.mark.parametrize("name", ["k", "v"])
def test_gradients_of_earlier_rows_do_not_meet_later_numbers_that_are_not_finite(name: str) -> None:
    torch = pytest.importorskip("torch")

    def gradient(value: float) -> np.ndarray:
        given = dict(zip("qkv", (torch.from_numpy(x) for x in drawn()), strict=True))
        if value != 0:
            given[name][..., 100, 1] = value
        leaf = given["q"].requires_grad_()
        out = attend(leaf, given["k"], given["v"], causal=True)
        return torch.autograd.grad(out[..., :96, :].square().sum(), leaf)[0].numpy()  # six chunks of 16

    clean = gradient(0)
    for value in (np.nan, np.inf):
        assert np.array_equal(gradient(value)[..., :96, :], clean[..., :96, :])


STATE = {
    "columns", "members", "means", "spread", "mean_values", "sight", "counts", "group_means", "group_spread",
    "group_values", "keys", "values", "visible", "moment", "metric",
}  # fmt: skip


def test_a_state_holds_full_chunks_in_clusters_and_the_open_one_as_it_is() -> None:
    q, k, v = drawn(batch=(2,))
    method = subquad.Clustered(**SMALL)
    sizes = []
    for n in (0, 15, 16, 17, 40):
        out, state = method.step(q[:, :n], k[:, :n], v[:, :n])
        assert out.shape == (2, n, 3)
        assert set(state) == STATE
        clusters = (1 + n // 16 * 4) * (n >= 16)
        assert state["means"].shape == (2, clusters, D)
        assert state["members"].shape == (2, clusters * 4, 3)
        assert state["keys"].shape == (2, n % 16, D)
        assert state["counts"].sum() == 2 * (n - n % 16)
        sizes.append(sum(x.nbytes for x in state.values()))
    # per token: k, v, and a part of a cluster; not the square of anything
    assert sizes[-1] <= 8 * 2 * (
        40 * (D + 3 + 1) + 9 * (3 * D + bands_of(D) + 3 + 1) + 4 * (D + bands_of(D) + 3) + 2 * D * D
    )


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        SMALL | {"sinks": 0},
        SMALL | {"cluster_size": 5, "opened": 0},
        GROUPED,
        GROUPED | {"cluster_size": 3, "sinks": 7, "power": 0.4},
        GROUPED | {"opened": 5, "share": 0.05},
    ],
)  # groups that reach into a second chunk
def test_long_streams_are_the_causal_method(options: dict[str, Any]) -> None:
    """Over chunks that keep the metric of an earlier one: 5, 7, 9, 10, 11 …"""
    q, k, v = drawn(n=330)
    mask = np.random.default_rng(0).random((2, 1, 330)) < 0.8
    method = subquad.Clustered(**options)
    full = method(q, k, v, causal=True, key_mask=mask)
    for sizes in ([1, 7, 40, 16, 130, 3, 133], [330], [165, 165]):
        state, outs = None, []
        for b, n in zip(np.cumsum(sizes), sizes, strict=True):
            part = slice(b - n, b)
            out, state = method.step(*(x[..., part, :] for x in (q, k, v)), state, key_mask=mask[..., part])
            outs.append(out)
            state = pickle.loads(pickle.dumps(state))
        assert relative_error(np.concatenate(outs, axis=-2), full) < 1e-12


def test_steps_elsewhere(eager: Library) -> None:
    q, k, v = drawn(n=45, batch=(2,))

    def steps(q: Any, k: Any, v: Any) -> Any:
        method, state, outs = subquad.Clustered(**SMALL), None, []
        for a, b in ((0, 10), (10, 40), (40, 45)):
            out, state = method.step(q[:, a:b, :], k[:, a:b, :], v[:, a:b, :], state)
            outs.append(out)
        return tuple(outs)

    outs = [eager.numpy(x) for x in eager.call(steps, q, k, v, dtype="float64")]
    assert relative_error(np.concatenate(outs, axis=-2), attend(q, k, v, causal=True)) < 1e-12


def test_a_state_goes_on_with_sizes_that_fit() -> None:
    q, k, v = drawn(batch=())
    _, state = subquad.Clustered(**SMALL).step(q, k, v)
    with pytest.raises(ValueError, match=r"a state goes on with the options"):
        subquad.Clustered(**SMALL | {"cluster_size": 8}).step(q, k, v, state)
    with pytest.raises(ValueError, match=r"state has \d+ keys in an open chunk, which does not fit Clustered"):
        subquad.Clustered(**SMALL | {"chunk": 5}).step(q, k, v, state)
    for call in ("step", "attend"):
        method, rows = subquad.Clustered(**SMALL | {"cluster_size": 8}), (q, k, v) if call == "step" else (q,)
        with pytest.raises(ValueError, match=r"state\['columns'\] ends in"):
            getattr(method, call)(*rows, state)
    with pytest.raises(ValueError, match=r"state\['members'\] ends in \(148, 3\), expected \(148, 2\)"):
        subquad.Clustered(**SMALL).step(q, k, v[:, :2], state)
    with pytest.raises(ValueError, match=r"scale=0.5 would have no effect.*attend"):
        subquad.Clustered().summarize(k, v, scale=0.5)


EVERY = SMALL | {"opened": 1000}  # all clusters are opened: exact attention


def cut(method: Any, q: Any, k: Any, v: Any, mask: Any, *ends: int) -> list[Any]:
    """The states of the parts of the keys between these places; every second one by steps."""
    states = []
    for i, (a, b) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        part = [x[..., a:b, :] for x in (q, k, v)]
        some = None if mask is None else mask[..., a:b]
        states.append(method.step(*part, key_mask=some)[1] if i % 2 else method.summarize(*part[1:], key_mask=some))
    return states


@pytest.mark.parametrize("heads", [(2, 1), (4, 2), (4, 4)], ids=str)
def test_states_that_merge_hold_the_keys_of_both(heads: tuple[int, int]) -> None:
    """With all clusters opened: exact attention to all keys, in any order of merging, and steps go on."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((2, heads[0], 150, D))
    k, v = rng.standard_normal((2, 2, heads[1], 150, D))
    mask = rng.random((2, 1, 150)) < 0.8
    method = subquad.Clustered(**EVERY)
    a, b, c = cut(method, q, k, v, mask, 37, 60, 120)
    n = slice(120, 150)
    new = [x[..., n, :] for x in (q, k, v)]
    expected = subquad.attention(q, k[..., :120, :], v[..., :120, :], "exact", key_mask=mask[..., :120])
    whole = subquad.attention(q, k, v, "exact", causal=True, key_mask=mask)[..., n, :]
    for state in (method.merge(method.merge(a, b), c), method.merge(a, method.merge(b, c))):
        assert relative_error(method.attend(q, state), expected) < 1e-12
        out, after = method.step(*new, state, key_mask=mask[..., n])
        assert relative_error(out, whole) < 1e-12
        assert after["counts"].sum() + after["visible"].sum() == heads[1] * mask.sum()
    for nothing in (None, method.summarize(k[..., :0, :], v[..., :0, :])):
        for pair in ((nothing, a), (a, nothing)):
            assert relative_error(method.attend(q, method.merge(*pair)), method.attend(q, a)) < 1e-12


def test_a_state_that_knows_its_queries_has_the_clusters_of_a_call() -> None:
    """Rows of a call whose places lie before all keys have no near keys, as rows of `attend` have none."""
    q, k, v = drawn(n=400, n_kv=200)
    mask = np.random.default_rng(0).random(200) < 0.8
    method = subquad.Clustered(**SMALL | {"window": 0})
    state = method.summarize(k, v, queries=q, key_mask=mask)
    assert relative_error(method.attend(q, state)[..., :200, :], method(q, k, v, key_mask=mask)[..., :200, :]) < 1e-12
    assert not np.array_equal(method.summarize(k, v, key_mask=mask)["means"], state["means"])


def test_hidden_keys_of_a_state_change_nothing() -> None:
    q, k, v = drawn(n=100)
    mask = np.random.default_rng(0).random(100) < 0.7
    method = subquad.Clustered(**SMALL)
    other = [np.where(mask[:, None], x, np.nan) for x in (k, v)]
    for make in (method.summarize, lambda k, v, key_mask: method.step(q, k, v, key_mask=key_mask)[1]):
        one, two = (method.attend(q, method.merge(make(*x, key_mask=mask), None)) for x in ((k, v), other))
        assert np.array_equal(one, two)
    none = method.summarize(k, v, key_mask=np.zeros(100, bool))
    assert np.all(method.attend(q, none) == 0)


def test_states_elsewhere(eager: Library) -> None:
    q, k, v = drawn(n=90, batch=(2,))

    def streamed(q: Any, k: Any, v: Any) -> Any:
        method = subquad.Clustered(**SMALL)
        a, b, c = cut(method, q, k, v, None, 20, 50, 90)
        return method.attend(q, method.merge(method.merge(a, b), c))

    assert relative_error(eager.numpy(eager.call(streamed, q, k, v, dtype="float64")), streamed(q, k, v)) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster_size": 0}, "cluster_size must be at least 1, got 0"),
        ({"opened": -1}, "opened must be at least 0, got -1"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"sinks": -1}, "sinks must be at least 0, got -1"),
        ({"window": -1}, "window must be at least 0, got -1"),
        ({"spans": 0}, "spans must be at least 1, got 0"),
        ({"expanded": -1}, "expanded must be at least 0, got -1"),
        ({"share": 1}, "share must be at least 0 and less than 1, got 1"),
        ({"share": -0.1}, "share must be at least 0 and less than 1, got -0.1"),
        ({"power": 0.6}, "power must lie in 0 … 0.5, got 0.6"),
        ({"power": -0.1}, "power must lie in 0 … 0.5, got -0.1"),
        ({"sinks": 5, "chunk": 4}, "sinks=5 are more keys than a chunk has, 4; pass a larger chunk or fewer sinks"),
        ({"implementation": "fast"}, "fast"),
    ],
)  # fmt: skip
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    q, k, v = drawn()
    with pytest.raises(ValueError, match=re.escape(message)):
        subquad.attention(q, k, v, "clustered", **options)


@pytest.mark.parametrize("name", ["cluster_size", "opened", "chunk", "sinks", "window", "spans", "expanded", "seed"])
@pytest.mark.parametrize("value", [2.5, "8", None, True])
def test_options_of_another_type(name: str, value: Any) -> None:
    if name == "expanded" and value is None:
        pytest.skip("None stands for all groups")
    with pytest.raises(TypeError, match=name):
        subquad.Clustered(**{name: value})


def test_sinks_are_a_number_here_and_logits_elsewhere() -> None:
    q, k, v = drawn()
    got = subquad.attention(q, k, v, "clustered", sinks=9, cluster_size=4, opened=1)
    assert np.array_equal(got, subquad.Clustered(sinks=9, cluster_size=4, opened=1)(q, k, v))
    with pytest.raises(NotImplementedError, match="Clustered cannot take sinks"):
        subquad.attention(q, k, v, "clustered", sinks=np.zeros(3))
