"""BigBird's plan: which blocks a row reads, each once, the same on every library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Library, relative_error
from rows.methods import Case, D

import subquad

N, SIZE = 120, 8
OPTIONS: dict[str, Any] = {"block_size": SIZE, "num_random_blocks": 2, "seed": 5}


def drawn(n: int = N, n_kv: int = 0, batch: tuple[int, ...] = (2, 3)) -> list[np.ndarray]:
    case = Case((*batch, n, D), (*batch, n_kv or n, D), (*batch, n_kv or n, 3))
    return [case.draw()[name] for name in ("q", "k", "v")]


def weights_of(q: np.ndarray, k: np.ndarray, **options: Any) -> np.ndarray:
    one = np.broadcast_to(np.eye(k.shape[-2]), (*k.shape[:-1], k.shape[-2]))
    return subquad.attention(q, k, one, "bigbird", **options)


def blocks_read(weights: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Whether each block of queries reads each block of keys, (..., q_blocks, blocks), where all lengths are multiples."""
    *batch, n, n_kv = weights.shape
    return (weights > 0).reshape(*batch, n // size, size, n_kv // size, size).any(axis=(-3, -1))


@pytest.mark.parametrize(
    "options", [{"block_size": N}, {"block_size": 10**6}, {"block_size": 7, "num_random_blocks": 40},
                {"block_size": 9, "window_blocks": 41, "num_random_blocks": 0, "global_blocks": (0, 0)},
                {"block_size": 9, "window_blocks": 1, "num_random_blocks": 0, "global_blocks": (14, 0)}])  # fmt: skip
def test_reading_every_block_is_exact(options: dict[str, Any]) -> None:
    for shape in ((N, N), (40, N), (N, 40)):
        q, k, v = drawn(*shape)
        for causal in (False, True):
            out = subquad.attention(q, k, v, "bigbird", causal=causal, **options)
            assert relative_error(out, subquad.attention(q, k, v, "exact", causal=causal)) < 1e-12


@pytest.mark.parametrize("global_blocks", [(1, 1), (0, 3), (3, 0), (2, 5)])
@pytest.mark.parametrize("blocks", [7, 8])
def test_global_blocks_read_all_and_all_read_them(blocks: int, global_blocks: tuple[int, int]) -> None:
    first, last = global_blocks
    place = np.arange(blocks)
    is_global = (place < first) | (place >= blocks - last)
    expected = np.eye(blocks, dtype=bool) | is_global | is_global[:, None]
    q, k, _ = drawn(blocks * SIZE, blocks * SIZE)
    options = {"block_size": SIZE, "window_blocks": 1, "num_random_blocks": 0, "global_blocks": global_blocks}
    assert np.array_equal(
        blocks_read(weights_of(q, k, **options)), np.broadcast_to(expected, (*q.shape[:-2], *expected.shape))
    )


@pytest.mark.parametrize("causal", [False, True])
def test_a_key_counts_once(causal: bool) -> None:
    """In blocks that overlap; queries of 0 weigh alike what they see."""
    plan = np.zeros((N // SIZE, 3), int)
    plan[:, 1], plan[:, 2] = np.arange(N // SIZE), -1
    for options in (OPTIONS, {"block_size": SIZE, "plan": plan, "global_blocks": (2, 2)}):
        q, k, _ = drawn()
        ones = subquad.attention(q, k, np.ones((2, 3, N, 1)), "bigbird", causal=causal, **options)
        assert np.max(np.abs(ones - 1)) < 1e-13
        weights = weights_of(0 * q, k, causal=causal, **options)
        count = (weights > 0).sum(axis=-1, keepdims=True)
        assert np.max(np.abs(np.where(weights > 0, weights - 1 / count, 0))) < 1e-15


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_draws_are_of_other_visible_blocks(causal: bool, window: int) -> None:
    """As many as asked for, as far as there are; neither near nor global; not the same for all heads."""
    q, k, _ = drawn()
    options = OPTIONS | {"window_blocks": window}
    read = blocks_read(weights_of(q, k, causal=causal, **options))[0]
    total = N // SIZE
    i, j = np.arange(total)[:, None], np.arange(total)
    shared = (abs(i - j) <= window // 2) | (j == 0) | (j == total - 1) | (i == 0) | (i == total - 1)
    shown = (j <= i) if causal else np.ones((total, total), bool)
    assert np.array_equal(read & shared, np.broadcast_to(shared & shown, read.shape))
    assert not (read & ~shown).any()
    others = (shown & ~shared).sum(axis=-1)
    assert np.array_equal((read & ~shared).sum(axis=-1), np.broadcast_to(np.minimum(others, 2), read.shape[:-1]))
    assert any((read[0] != read[head]).any() for head in (1, 2))
    other = blocks_read(weights_of(q, k, causal=causal, **(options | {"seed": 6})))[0]
    assert (other != read).any()


def test_every_block_is_drawn_as_often() -> None:
    """Over 300 heads, by five standard deviations."""
    total, heads = 20, 300
    x = np.zeros((heads, total, 1))
    read = blocks_read(weights_of(x, x, block_size=1, num_random_blocks=3, seed=0), 1)
    counts = read[:, 10].sum(axis=0)
    others = np.delete(np.arange(total), [0, 9, 10, 11, total - 1])
    share = 3 / len(others)
    assert np.all(counts[[0, 9, 10, 11, total - 1]] == heads)
    assert np.max(np.abs(counts[others] - heads * share)) < 5 * np.sqrt(heads * share * (1 - share))


def test_same_plan_on_every_library(eager: Library) -> None:
    q, k, v = drawn()
    for causal in (False, True):
        if isinstance(eager, Jax) and not causal:
            continue
        out = eager.call(
            lambda *x, causal=causal: subquad.attention(*x, "bigbird", causal=causal, **OPTIONS),
            q,
            k,
            v,
            dtype="float64",
        )
        assert relative_error(eager.numpy(out), subquad.attention(q, k, v, "bigbird", causal=causal, **OPTIONS)) < 1e-12


def test_the_plan_does_not_depend_on_the_batch_or_the_values() -> None:
    q, k, _ = drawn()
    read = blocks_read(weights_of(q, k, **OPTIONS))
    assert np.array_equal(read[0], read[1])
    assert np.array_equal(read[:1], blocks_read(weights_of(-2 * q[:1], k[:1], **OPTIONS)))
    grouped = blocks_read(weights_of(np.concatenate([q, q[:, :1]], axis=1), k[:, :2], **OPTIONS))
    assert np.array_equal(grouped[:, :3], read)


def test_plan_of_any_library_and_of_no_blocks(eager: Library) -> None:
    """Given as an array of NumPy or of the library; −1 stands for none."""
    q, k, v = drawn()
    plan = np.random.default_rng(0).integers(-1, N // SIZE, (3, N // SIZE, 2))
    expected = subquad.attention(q, k, v, "bigbird", block_size=SIZE, plan=plan)
    with eager.context("float64"):
        own = eager.array(plan.astype(np.int32), "float64")
    for given in (plan, own):
        out = eager.call(
            lambda *x, given=given: subquad.attention(*x, "bigbird", block_size=SIZE, plan=given),
            q,
            k,
            v,
            dtype="float64",
        )
        assert relative_error(eager.numpy(out), expected) < 1e-12
    none = subquad.attention(q, k, v, "bigbird", block_size=SIZE, num_random_blocks=0)
    for plan in (np.full((N // SIZE, 2), -1), np.zeros((1, N // SIZE, 0), int)):
        assert np.array_equal(subquad.attention(q, k, v, "bigbird", block_size=SIZE, plan=plan), none)


def test_traced_plan_is_refused(jax_library: Jax) -> None:
    q = np.zeros((16, 4))
    with pytest.raises(ValueError, match="plan of a program that is traced has no values"):
        jax_library.call(lambda q, plan: subquad.attention(q, q, q, "bigbird", block_size=8, plan=plan), q,
                         np.zeros((2, 1), np.int32), dtype="float32")  # fmt: skip


x = np.zeros((3, 16, 4))
ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "size": (ValueError, "block_size must be at least 1, got 0", {"block_size": 0}),
    "size-float": (TypeError, "block_size must be an integer", {"block_size": 8.0}),
    "window-even": (ValueError, "window_blocks must be odd.*got 2", {"window_blocks": 2}),
    "window-zero": (ValueError, "window_blocks must be at least 1", {"window_blocks": 0}),
    "global-number": (TypeError, "global_blocks must be a pair of numbers.*got 2", {"global_blocks": 2}),
    "global-negative": (ValueError, r"global_blocks\[1\] must be at least 0", {"global_blocks": (1, -1)}),
    "random": (ValueError, "num_random_blocks must be at least 0", {"num_random_blocks": -1}),
    "seed": (ValueError, "seed must be at least 0", {"seed": -1}),
    "seed-and-plan": (ValueError, "seed=1 would have no effect", {"seed": 1, "plan": np.zeros((2, 1), int)}),
    "plan-list": (TypeError, "plan must be an array of integers, got list", {"plan": [[0], [1]]}),
    "plan-floats": (TypeError, "plan has dtype float64, expected integers", {"plan": np.zeros((2, 1)), "block_size": 8}),
    "plan-blocks": (ValueError, r"plan has shape \(3, 1\), expected \(2, r\) or \(3, 2, r\)", {"plan": np.zeros((3, 1), int), "block_size": 8}),
    "plan-heads": (ValueError, r"plan has shape \(2, 2, 1\)", {"plan": np.zeros((2, 2, 1), int), "block_size": 8}),
    "plan-number": (ValueError, "plan names block 2, but there are 2 blocks of keys", {"plan": np.full((2, 1), 2), "block_size": 8}),
    "plan-negative": (ValueError, "plan names block -2", {"plan": np.full((2, 1), -2), "block_size": 8}),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_is_wrong(case: str) -> None:
    error, message, options = ERRORS[case]
    with pytest.raises(error, match=message):
        subquad.attention(x, x, x, "bigbird", **options)


@pytest.mark.parametrize(("num_random_blocks", "n"), [(0, 16), (0, 20), (1, 24), (2, 28)])
def test_the_end_blocks_read_every_key_of_a_short_sequence(num_random_blocks: int, n: int) -> None:
    """Also where the list of a block has as many places as there are blocks."""
    q, k = np.random.default_rng(0).standard_normal((2, n, 5))
    method = subquad.BigBird(block_size=4, num_random_blocks=num_random_blocks)
    weights = subquad.attention_weights(q, k, method)
    assert (weights[[0, 3, n - 4, n - 1]] > 0).all()


@pytest.mark.parametrize("given", [(1, 1, 1), (1,), 2, [1, 1]])
def test_global_blocks_are_a_pair(given: Any) -> None:
    with pytest.raises(TypeError, match="global_blocks"):
        subquad.BigBird(global_blocks=given)


def test_blocks_beside_global_ones_do_not_read_all_where_lists_have_room_for_all() -> None:
    """Six blocks: the second has three near ones, of which one is global, the last one and one of the two others."""
    q, k, _ = drawn(6 * SIZE, 6 * SIZE)
    read = blocks_read(weights_of(q, k, block_size=SIZE, window_blocks=3, num_random_blocks=1, seed=5))
    assert np.array_equal(read.sum(axis=-1), np.broadcast_to([6, 5, 6, 6, 5, 6], read.shape[:-1]))
