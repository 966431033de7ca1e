"""LSH attention: one bucket is exact, more rounds see more, and rotations are values."""

from __future__ import annotations

import importlib.resources
import itertools
from typing import Any

import numpy as np
import pytest
from rows import definitions
from rows.libraries import Jax, Library, relative_error
from rows.methods import Case, D

import subquad

N = 120


def drawn(n: int = N, n_kv: int = 0, batch: tuple[int, ...] = (2, 3)) -> list[np.ndarray]:
    case = Case((*batch, n, D), (*batch, n_kv or n, D), (*batch, n_kv or n, 3))
    return [case.draw()[name] for name in ("q", "k", "v")]


@pytest.mark.parametrize(
    "options", [{"bucket_size": N}, {"bucket_size": 10**9}, {"bucket_size": N // 2, "num_rounds": 5}]
)
def test_one_bucket_is_exact(options: dict[str, Any]) -> None:
    """A chunk that holds all; or two chunks, all of whose pairs meet in some of the rounds."""
    for shape in ((N, N), (40, N), (N, 40)):
        q, k, v = drawn(*shape)
        for causal in (False, True):
            out = subquad.attention(q, k, v, "lsh", causal=causal, **options)
            if options["bucket_size"] >= N:
                assert relative_error(out, subquad.attention(q, k, v, "exact", causal=causal)) < 1e-12


def test_a_pair_that_meets_often_counts_once() -> None:
    """However many rounds there are, as soon as all pairs have met."""
    q, k, v = drawn()
    for rounds in (40, 41):
        for causal in (False, True):
            out = subquad.attention(q, k, v, "lsh", bucket_size=40, num_rounds=rounds, causal=causal)
            assert relative_error(out, subquad.attention(q, k, v, "exact", causal=causal)) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared_qk", [False, True])
def test_error_falls_with_rounds_on_real_keys(shared_qk: bool, causal: bool) -> None:
    file = importlib.resources.files("subquad") / "data" / "sample.npz"
    if not file.is_file():
        pytest.skip("no sample data in this installation")
    with file.open("rb") as opened, np.load(opened) as stored:
        q, k, v = (stored[name][:, :384].astype(float) for name in ("q", "k", "v"))
    k = q if shared_qk else k
    exact = subquad.attention(q, k, v, "exact", causal=causal)
    errors = []
    for rounds in (1, 4, 16, 64):
        out = subquad.attention(q, k, v, "lsh", bucket_size=32, num_rounds=rounds, shared_qk=shared_qk, causal=causal)
        errors.append(np.linalg.norm(out - exact) / np.linalg.norm(exact))
    assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.1


def test_rows_that_meet_point_the_same_way() -> None:
    """A shared row meets those that are near in angle: the keys that it sees are nearer than those that it does not."""
    x = np.random.default_rng(0).standard_normal((256, D))
    weights = subquad.attention(x, x, np.eye(256), "lsh", bucket_size=8, num_rounds=2, shared_qk=True, scale=1e-9)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    cosines = unit @ unit.T
    apart = ~np.eye(256, dtype=bool)
    weights, cosines = weights[apart], cosines[apart]
    assert cosines[weights > 0].mean() > cosines[weights == 0].mean() + 0.15


def test_shared_rows_are_hashed_once() -> None:
    """The same pattern as of q given twice, but for hidden rows, which lie last on both sides."""
    q, _, v = drawn()
    for causal in (False, True):
        out, twice = (
            subquad.attention(q, q, v, "lsh", bucket_size=16, num_rounds=2, causal=causal, shared_qk=shared)
            for shared in (True, False)
        )
        assert np.array_equal(out, twice)
    copy = subquad.attention(q, q.copy(), v, "lsh", bucket_size=16, num_rounds=2, shared_qk=True)
    assert np.array_equal(copy, subquad.attention(q, q, v, "lsh", bucket_size=16, num_rounds=2))
    with pytest.raises(ValueError, match=r"shared_qk=True says .* pass q as k"):
        subquad.attention(q, q + 1, v, "lsh", shared_qk=True)
    with pytest.raises(ValueError, match="shared_qk=True says"):
        subquad.attention(q, q[..., 1:, :], v[..., 1:, :], "lsh", shared_qk=True)


@pytest.mark.parametrize("causal", [False, True])
def test_shared_rows_under_a_mask(causal: bool) -> None:
    """Hidden rows are queries still, of the last chunks."""
    q, _, v = drawn(batch=())
    mask = np.arange(N) % 3 > 0
    options = {"bucket_size": 8, "shared_qk": True, "unit_keys": True, "allow_self": False}
    method = subquad.LSH(num_rounds=2, **options)
    rotations = method.with_rotations(q).rotations
    expected = definitions.lsh(q, q, v, mask, causal=causal, rotations=rotations, **options)
    assert relative_error(method(q, q, v, causal=causal, key_mask=mask), expected) < 1e-12
    assert causal or np.any(expected[~mask] != 0)


def test_self_is_seen_only_where_nothing_else_is() -> None:
    q, _, _ = drawn(batch=())
    one = np.eye(N)
    for causal in (False, True):
        given = {"bucket_size": 8, "num_rounds": 2, "shared_qk": True, "causal": causal, "seed": 3}
        seen, others = (subquad.attention(q, q, one, "lsh", allow_self=x, **given) > 0 for x in (True, False))
        alone = seen.sum(axis=-1) == 1
        assert np.array_equal(np.diagonal(others), alone)
        assert np.array_equal(others & ~one.astype(bool), seen & ~one.astype(bool))
        assert np.all(np.diagonal(seen))
        assert not causal or alone[0]


def test_keys_of_length_one_change_nothing_but_logits() -> None:
    q, k, v = drawn()
    lengths = np.linalg.norm(k, axis=-1, keepdims=True)
    out = subquad.attention(q, k, v, "lsh", bucket_size=16, unit_keys=True)
    assert relative_error(out, subquad.attention(q, k / lengths, v, "lsh", bucket_size=16)) < 1e-12
    k[:, :, 5] = 0  # a row without direction
    assert np.isfinite(subquad.attention(q, k, v, "lsh", bucket_size=16, unit_keys=True)).all()


@pytest.mark.parametrize("n", [N, 2100])
def test_fixed_rotations_are_those_of_the_draw(n: int) -> None:
    """Also where the buckets have two factors."""
    q, k, v = drawn(n, batch=())
    size = 16 if n == N else 4
    method = subquad.LSH(bucket_size=size, num_rounds=2, seed=4)
    fixed = method.with_rotations(q, k)
    assert fixed.seed is None
    assert fixed.rotations.shape == (2, D, 4 if n == N else (24 + 22) // 2)
    assert np.array_equal(fixed(q, k, v), method(q, k, v))
    assert np.array_equal(fixed.rotations, method.with_rotations(k).rotations)
    assert not np.array_equal(fixed.rotations, subquad.LSH(bucket_size=size, num_rounds=2).with_rotations(q).rotations)
    first = subquad.LSH(bucket_size=size, num_rounds=1, seed=4).with_rotations(q).rotations
    assert np.array_equal(fixed.rotations[:1], first)  # a round more changes none before
    assert "rotations=<(2, 8," in repr(fixed)
    assert "seed=4" in repr(method)


def test_same_rotations_on_every_library(eager: Library) -> None:
    q, k, v = drawn()
    for options in ({"bucket_size": 16, "num_rounds": 2}, {"bucket_size": 2, "num_rounds": 1}):
        if isinstance(eager, Jax) and options["num_rounds"] == 2:
            continue
        out = eager.call(lambda *x, options=options: subquad.attention(*x, "lsh", **options), q, k, v, dtype="float64")
        assert relative_error(eager.numpy(out), subquad.attention(q, k, v, "lsh", **options)) < 1e-12


def test_more_buckets_than_one_hash_has() -> None:
    """Buckets of two factors are as even as those of one, and rows that meet are near."""
    from subquad.attention.lsh import bucket_factors
    from subquad.kernels.hashed_order import buckets

    assert [bucket_factors(n, 64) for n in (1, 64, 65, 129, 8192)] == [(2,), (2,), (2,), (4,), (128,)]
    for n in (8193, 10**5, 10**6 + 1, 10**8):
        first, second = bucket_factors(n, 64)
        assert first % 2 == second % 2 == 0
        assert -(-n // 64) <= first * second < 1.35 * -(-n // 64)
        assert abs(first - second) <= 0.3 * first
    x = np.random.default_rng(0).standard_normal((4000, 16))
    R = np.random.default_rng(1).standard_normal((16, 16))
    found = buckets(np, x, R, (16, 16))
    assert found.min() >= 0
    assert 200 < len(np.unique(found)) <= 256
    assert found.max() < 256


def test_hidden_keys_take_no_room() -> None:
    """They lie last, so that visible ones fill the chunks before: hidden NaN moves no bit, and where a chunk holds all
    visible keys, all rows that read it see all."""
    q, k, v = drawn(40, 200, batch=())
    mask = np.arange(200) % 5 == 0
    given = {"bucket_size": 16, "num_rounds": 2, "key_mask": mask}
    out = subquad.attention(q, k, v, "lsh", **given)
    k[~mask] = v[~mask] = np.nan
    assert np.array_equal(subquad.attention(q, k, v, "lsh", **given), out)
    one = np.eye(200)
    for rounds in (1, 2):
        weights = subquad.attention(q, k, one, "lsh", bucket_size=40, num_rounds=rounds, key_mask=mask)
        assert np.array_equal(weights > 0, np.broadcast_to(mask, weights.shape))  # 40 queries are one chunk


x = np.zeros((2, 16, 4))
ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "size": (ValueError, "bucket_size must be at least 1, got 0", {"bucket_size": 0}),
    "size-float": (TypeError, "bucket_size must be an integer", {"bucket_size": 8.0}),
    "rounds": (ValueError, "num_rounds must be at least 1", {"num_rounds": 0}),
    "seed": (TypeError, "seed must be an integer", {"seed": 1.5}),
    "shared": (TypeError, "shared_qk must be True or False, got 1", {"shared_qk": 1}),
    "unit": (TypeError, "unit_keys must be True or False", {"unit_keys": None}),
    "self": (TypeError, "allow_self must be True or False", {"allow_self": "no"}),
    "seed-and-rotations": (ValueError, "seed=1 would have no effect: rotations are given", {"seed": 1, "rotations": np.ones((4, 4, 1))}),
    "rotations-rounds": (ValueError, r"rotations has shape \(3, 4, 1\), expected \(4, 4, columns\)", {"rotations": np.ones((3, 4, 1))}),
    "rotations-width": (ValueError, r"rotations has shape \(4, 5, 1\)", {"rotations": np.ones((4, 5, 1))}),
    "rotations-empty": (ValueError, r"rotations has shape \(4, 4, 0\)", {"rotations": np.ones((4, 4, 0))}),
    "rotations-axes": (ValueError, r"rotations has shape \(4, 4\)", {"rotations": np.ones((4, 4))}),
    "rotations-integers": (TypeError, "rotations has dtype int64", {"rotations": np.ones((4, 4, 1), int)}),
    "rotations-list": (TypeError, "rotations is a list", {"rotations": [[[1.0]]]}),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_is_wrong(case: str) -> None:
    error, message, options = ERRORS[case]
    with pytest.raises(error, match=message):
        subquad.attention(x, x, x, "lsh", **options)


def test_wrong_rotations_are_refused_where_there_is_nothing_to_hash() -> None:
    with pytest.raises(ValueError, match="rotations has shape"):
        subquad.attention(x[:, :0], x, x, "lsh", rotations=np.ones((3, 4, 1)))
    with pytest.raises(TypeError, match="q is a list"):
        subquad.LSH().with_rotations([[1.0]])
    with pytest.raises(ValueError, match=r"q has shape \(4,\)"):
        subquad.LSH().with_rotations(x[0, 0])


def test_a_key_of_norm_0_has_a_finite_gradient_and_a_hidden_one_none() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for first in (0.0, np.nan):
        k = torch.from_numpy(rng.standard_normal((9, 4)))
        k[0] = first
        q, v = (torch.from_numpy(rng.standard_normal((9, d))).requires_grad_() for d in (4, 3))
        k.requires_grad_()
        mask = torch.arange(9) > 0 if np.isnan(first) else None
        out = subquad.attention(q, k, v, "lsh", bucket_size=4, unit_keys=True, key_mask=mask)
        grads = torch.autograd.grad(out.sin().sum(), (q, k, v))
        assert all(torch.isfinite(x).all() for x in grads)
        assert mask is None or not grads[1][0].any()


def test_a_program_of_any_length() -> None:
    torch = pytest.importorskip("torch")
    program = torch.compile(lambda q: subquad.attention(q, q, q, "lsh"), dynamic=True, backend="aot_eager")
    for n in (100, 130):
        q = torch.from_numpy(np.random.default_rng(0).standard_normal((2, n, 8)))
        assert torch.allclose(program(q), subquad.attention(q, q, q, "lsh"), rtol=1e-12)
