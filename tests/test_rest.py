"""What a row does not visit enters as centroids: each key once, and the error falls."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from rows.libraries import relative_error
from rows.methods import Case, D, clusters_of

import subquad
from subquad.attention.rest import centroids
from subquad.cli.inputs import read_sample
from subquad.kernels import centroid_attention

N = 192
METHODS: dict[str, dict[str, Any]] = {
    "window": {"method": "window", "left": 20, "rest_size": 4},
    "window-sides": {"method": "window", "left": 3, "right": 40, "rest_size": 8},
    "bigbird": {"method": "bigbird", "block_size": 16, "num_random_blocks": 1, "rest_size": 4},
    "lsh": {"method": "lsh", "bucket_size": 16, "num_rounds": 1, "rest_size": 4},
    "lsh-rounds": {"method": "lsh", "bucket_size": 16, "num_rounds": 3, "rest_size": 4},
}
forms = pytest.mark.parametrize(
    ("name", "causal"), [*((name, False) for name in METHODS), ("window", True), ("bigbird", True)]
)


def drawn(n: int = N, d_v: int = 3) -> list[np.ndarray]:
    case = Case((2, n, D), (2, n, D), (2, n, d_v), mask="random")
    return list(case.draw().values())


@forms
def test_is_exact_where_the_keys_of_a_cluster_are_equal(name: str, causal: bool) -> None:
    """As many equal keys and values as a chunk has: whatever is visited, the rest weighs what its keys weigh."""
    rng = np.random.default_rng(1)
    chunk, kinds = (256, 3) if "window" in name and not causal else (16, 12)
    q, keys, values = (rng.standard_normal(shape) for shape in ((chunk * kinds, D), (kinds, D), (kinds, 3)))
    k, v = (np.repeat(x, chunk, axis=0) for x in (2 * keys, values))
    exact = subquad.attention(q, k, v, "exact", causal=causal)
    options = METHODS[name]
    assert relative_error(subquad.attention(q, k, v, causal=causal, rest="centroids", **options), exact) < 1e-12
    plain = {key: x for key, x in options.items() if key != "rest_size"}
    assert relative_error(subquad.attention(q, k, v, causal=causal, **plain), exact) > 0.05


@forms
@pytest.mark.parametrize("size", [1e18, 1e19, 1e36])
def test_large_logits_have_finite_weights(name: str, causal: bool, size: float) -> None:
    """Also where the square of a logit, of a query, or of a key is beyond the range of the dtype."""
    q, k, v, _ = drawn()
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    k[..., 0] = 0  # no spread in a channel: 0 · ∞ is NaN
    large = np.float32(size)
    with np.errstate(all="ignore"):
        for given in ((q * large, k / 64, v), (q / 64, k * large, v)):
            out = subquad.attention(*given, causal=causal, rest="centroids", **METHODS[name])
            assert np.all(out <= v.max(axis=-2, keepdims=True) + 1e-5)
            assert np.all(out >= v.min(axis=-2, keepdims=True) - 1e-5)


@forms
def test_every_key_counts_once(name: str, causal: bool) -> None:
    """To queries of 0 all keys are alike: a block or chunk of keys weighs as much as it has visible keys."""
    q, k, _, mask = drawn()
    weights = subquad.attention(
        0 * q, k, np.broadcast_to(np.eye(N), (2, N, N)), key_mask=mask, causal=causal, rest="centroids", **METHODS[name]
    )
    visible = mask[:, None, :] & ((np.arange(N)[:, None] >= np.arange(N)) | (not causal))
    count = visible.sum(axis=-1, keepdims=True)
    assert np.all(weights[~np.broadcast_to(visible, weights.shape)] == 0)
    counted = weights * count
    if name in ("bigbird", "lsh"):  # whose clusters are visited wholly or not at all
        assert np.max(np.abs(counted - visible)) < 1e-12
    else:  # the mean of a cluster that is visited in part is that of all its keys
        assert np.max(np.abs(counted.sum(axis=-1) - count[..., 0])) < 1e-12 * N
        assert np.max(np.abs(counted - visible)) < 1


@pytest.mark.parametrize("causal", [False, True])
def test_the_log_sum_exp_counts_every_key_once(causal: bool) -> None:
    """Also those of clusters of which a row visits some keys."""
    q, k, v, mask = drawn()
    options = {"rest_size": 4, "left": 20, "rest": "centroids", "causal": causal, "return_lse": True}
    visible = mask[:, None, :] & ((np.arange(N)[:, None] >= np.arange(N)) | (not causal))
    with np.errstate(divide="ignore"):
        expected = np.log(visible.sum(axis=-1))
    for given in ({}, {"global_mask": np.arange(N) % 50 == 3}):
        _, lse = subquad.attention(0 * q, k, v, "window", key_mask=mask, **given, **options)
        seen = expected > -np.inf
        assert np.array_equal(lse == -np.inf, ~seen)
        assert np.max(np.abs(lse[seen] - expected[seen])) < 1e-12


# error without and with centroids on the sample that comes with the package, at most; docs/methods have the figures
SAMPLE = [
    ("window", {"left": 64}, False, 0.96, 0.43),
    ("window", {"left": 64}, True, 0.81, 0.13),
    ("window", {}, True, 0.66, 0.045),
    ("bigbird", {}, False, 0.42, 0.23),
    ("bigbird", {}, True, 0.10, 0.075),
    ("lsh", {"num_rounds": 1}, False, 0.99, 0.55),
    ("lsh", {}, False, 0.59, 0.41),
]


@pytest.mark.parametrize(("method", "options", "causal", "at_least", "at_most"), SAMPLE)
def test_error_on_real_heads_falls(
    method: str, options: dict[str, Any], causal: bool, at_least: float, at_most: float
) -> None:
    sample = read_sample()
    q, k, v = sample.q, sample.k, sample.v
    exact = subquad.attention(q, k, v, "exact", causal=causal)
    plain, with_rest = (
        relative_norm(subquad.attention(q, k, v, method, causal=causal, rest=rest, **options), exact)
        for rest in (None, "centroids")
    )
    assert plain > at_least
    assert with_rest < at_most


def relative_norm(out: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("method", ["window", "bigbird", "lsh"])
def test_without_rest_nothing_is_new(method: str) -> None:
    """The same method, which reaches no kernel of centroids."""
    q, k, v, _ = drawn()
    plain, none = subquad.METHODS[method](), subquad.METHODS[method](rest=None)
    assert plain == none
    assert "rest" not in repr(none)
    assert not {"centroid_attention", "balanced_tree"} & {x.kernel for x in subquad.explain(none, q, k, v).choices}
    assert "rest='centroids'" in repr(subquad.METHODS[method](rest="centroids"))


def test_clusters_hold_each_visible_key_once() -> None:
    """The key of the smallest norm of a block is alone, and what lies together in a block is near."""
    rng = np.random.default_rng(0)
    k, keep = rng.standard_normal((150, D)), rng.random(150) < 0.8
    found = clusters_of(k, keep, 64, 8)
    places = [place for _, members in found for place in members]
    assert sorted(places) == np.flatnonzero(keep).tolist()
    assert all(place // 64 == block for block, members in found for place in members)
    assert max(len(members) for _, members in found) <= 8
    for block in range(3):
        own = [place for place in np.flatnonzero(keep) if place // 64 == block]
        assert [min(own, key=lambda place: np.sum(k[place] ** 2))] in [members for _, members in found]
    assert centroids(np, k, k, keep, 64, 8, "generic").members.shape == (3 * (1 + 8), 8)
    assert scatter(k, [members for _, members in found]) < 0.7 * scatter(
        k, [[place for place in np.flatnonzero(keep) if place // 64 == block] for block in range(3)]
    )


def scatter(k: np.ndarray, clusters: list[list[int]]) -> float:
    """Σ of the squared distances of keys from the mean of their cluster."""
    return float(sum(np.sum((k[members] - k[members].mean(axis=0)) ** 2) for members in clusters))


def test_a_row_alone_equals_the_row_in_a_sequence() -> None:
    """Chunks are counted from the first key, and no query decides what lies together."""
    q, k, v, mask = drawn()
    options = {"left": 20, "rest": "centroids", "rest_size": 4, "key_mask": mask}
    for causal in (False, True):
        whole = subquad.attention(q, k, v, "window", causal=causal, **options)
        for last in (1, 33):
            own = subquad.attention(q[:, -last:], k, v, "window", causal=causal, **options)
            assert relative_error(own, whole[:, -last:]) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_documents_of_a_window_are_seen_apart(causal: bool) -> None:
    q, k, v, _ = drawn()
    numbers = np.repeat([4, 0, 7], [50, 100, N - 150])
    options = {"left": 15, "rest": "centroids", "rest_size": 4, "causal": causal, "return_lse": True}
    out, lse = subquad.attention(q, k, v, "window", segments=numbers, **options)
    for part in (slice(0, 50), slice(50, 150), slice(150, N)):
        own = subquad.attention(q[:, part], k[:, part], v[:, part], "window", **options)
        assert relative_error(out[:, part], own[0]) < 1e-12
        assert np.max(np.abs(lse[:, part] - own[1])) < 1e-12


def test_own_place_of_shared_rows_stays_hidden() -> None:
    """With allow_self=False a query gives no weight to its own key, met or summed up."""
    x = drawn()[0][0]
    weights = subquad.attention(
        x, x, np.eye(N), subquad.LSH(bucket_size=16, shared_qk=True, allow_self=False, rest="centroids", rest_size=4)
    )
    assert np.max(np.abs(weights.sum(axis=-1) - 1)) < 1e-12
    plain = subquad.attention(x, x, np.eye(N), subquad.LSH(bucket_size=16, shared_qk=True, allow_self=False))
    assert np.all(np.diagonal(weights) == 0)
    assert np.all(np.diagonal(plain) == 0)


def test_memory_grows_like_n() -> None:
    """Four times the keys take four times the memory, not sixteen; the matrix of rows and clusters does not exist."""

    def peak(n: int) -> int:
        q, k, v = np.random.default_rng(0).standard_normal((3, n, D)).astype(np.float32)
        tracemalloc.start()
        subquad.attention(q, k, v, "window", left=64, causal=True, rest="centroids", implementation="generic")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(512)
    few, many = peak(4096), peak(16384)
    assert many < 6 * few
    assert many < 16384 * (16384 // 16) * 4  # float32 numbers of rows × clusters


REFUSED = [
    ("window", {"rest": "means"}, {}, ValueError, "rest is 'means'"),
    ("bigbird", {"rest": True}, {}, ValueError, "rest is True"),
    ("lsh", {"rest_size": 4}, {}, ValueError, "rest_size=4 would have no effect"),
    ("window", {"rest": "centroids", "rest_size": 0}, {}, ValueError, "rest_size"),
    ("window", {"rest": "centroids", "dilation": 2}, {}, NotImplementedError, "dilation=2"),
    ("window", {"rest": "centroids", "left": 6}, {"causal": True}, ValueError, "left=15 or more, or rest_size=7"),
    ("window", {"rest": "centroids"}, {"visible": np.arange(N)}, NotImplementedError, "visible beside rest"),
    ("window", {"rest": "centroids", "global_mask": np.arange(N) == 0}, {"segments": np.arange(N) // 70},
     NotImplementedError, "segments beside global_mask"),
    ("bigbird", {"rest": "centroids"}, {"visible": np.arange(N)}, NotImplementedError, "visible beside rest"),
    ("lsh", {"rest": "centroids"}, {"visible": np.arange(N)}, NotImplementedError, "visible beside rest"),
    ("lsh", {"rest": "centroids"}, {"causal": True}, NotImplementedError, "causal"),
    ("lsh", {"rest": "centroids", "allow_self": False}, {}, NotImplementedError, "shared_qk=True"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "given", "error", "words"), REFUSED)
def test_what_cannot_be_summed_up_is_refused(
    method: str, options: dict[str, Any], given: dict[str, Any], error: type[Exception], words: str
) -> None:
    q, k, v, _ = drawn()
    with pytest.raises(error, match=words):
        subquad.attention(q, k, v, method, **options, **given)


def test_blocks_that_lie_across_the_rows_need_a_window() -> None:
    q, k, v, _ = drawn()
    method = subquad.BigBird(block_size=16, window_blocks=1, rest="centroids")
    with pytest.raises(ValueError, match="window_blocks=3"):
        method(q[:, 5:], k, v, causal=True)
    assert method(q[:, 16:], k, v, causal=True).shape == (2, N - 16, 3)


def test_a_window_with_rest_has_no_step() -> None:
    q, k, v, _ = drawn()
    with pytest.raises(NotImplementedError, match="step has no form with rest"):
        subquad.Window(left=20, rest="centroids").step(q, k, v)


def test_no_cluster_weighs_nothing() -> None:
    """The log-sum-exp of no centroid is −∞, so that a join with other parts leaves these as they are."""
    q, none = np.ones((3, 4)), np.zeros((0, 4))
    members, blocks = np.zeros((0, 2), np.int32), np.full((1, 1), -1, np.int32)
    given = (q, none, none, np.zeros((0, 5)), members, None, blocks, None, None, None, None)
    out, lse = centroid_attention(*given, scale=1.0, size=4, per_block=4, length=16)
    assert np.array_equal(out, np.zeros((3, 5)))
    assert np.array_equal(lse, np.full(3, -np.inf))


@pytest.mark.parametrize("implementation", ["auto", "generic"])
@forms
def test_values_alone_may_have_a_batch(name: str, causal: bool, implementation: str) -> None:
    q, k, v, _ = drawn()
    options = METHODS[name] | {"rest": "centroids", "causal": causal, "implementation": implementation}
    if name == "bigbird":  # heads draw random blocks of their own
        options["num_random_blocks"] = 0
    found = subquad.attention(q[0], k[0], v, **options)
    expected = [subquad.attention(q[0], k[0], x, **options) for x in v]
    assert relative_error(found, np.stack(expected)) < 1e-12
