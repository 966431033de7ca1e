"""The bound by which "auto" chooses: its rows, its formula, and heads whose error sits in few rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from rows.libraries import Library

import subquad
from subquad.attention import error_bounds
from subquad.attention.call import enter
from subquad.attention.error_bounds import bounded, carried, draw
from subquad.attention.sampled_rows import sample
from subquad.cli.inputs import read_sample
from subquad.random import draw_rows

N = 2048


def exact(call: Any) -> Any:
    return subquad.attention(call.q, call.k, call.v, "exact", causal=call.causal, scale=call.scale)


@dataclass(frozen=True, repr=False, eq=False)
class Wrong(subquad.Exact):
    """Exact attention but for some rows, which are `error` times too long, and know it if they are `known`."""

    error: float = 0.0
    rows: tuple[int, ...] = ()
    known: bool = False
    opened: int = 0

    def _kernel(self, call: Any) -> None:
        """No kernel computes what is wrong."""

    def _evaluate(self, call: Any) -> Any:
        factor = np.ones((call.q.shape[-2], 1))
        factor[list(self.rows) or slice(None)] += self.error
        return exact(call) * factor

    def bare_rows(self, call: Any) -> Any:
        return self.rows if self.known else ()


@dataclass(frozen=True, repr=False, eq=False)
class Falling(Wrong):
    """All rows of it are wrong, until clusters enough are opened; then all are right."""

    enough: int = 2

    def _evaluate(self, call: Any) -> Any:
        return exact(call) * (1.0 + self.error * (self.opened < self.enough))


def arrays(n: int = N) -> tuple[Any, Any, Any]:
    """Rows of one length: all exact outputs are (1, 1)."""
    return np.zeros((n, 2)), np.zeros((n, 2)), np.ones((n, 2))


def chosen(*ladder: Any, n: int = N, **options: Any) -> Any:
    return subquad.Auto(ladder=ladder, crossover=1, **options).with_choice(*arrays(n)).choice


def call_of(n: int, n_kv: int, *, causal: bool) -> Any:
    return enter(None, {"q": np.zeros((n, 2)), "k": np.zeros((n_kv, 2)), "v": np.zeros((n_kv, 2))}, causal=causal)


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "n_kv"), [(900, 900), (600, 700), (700, 600), (300, 1000), (5, 5), (1, 900), (520, 513)])
@pytest.mark.parametrize("causal", [False, True])
def test_bare_rows_see_their_own_key_alone_near_them(n: int, n_kv: int, causal: bool) -> None:
    method, places = subquad.Clustered(chunk=128), np.arange(n) + n_kv - n
    expected = np.flatnonzero((places % 128 == 0) & (places > 0) & causal)
    assert list(method.bare_rows(call_of(n, n_kv, causal=causal))) == list(expected)


@pytest.mark.parametrize(("n", "n_kv"), [(2048, 2048), (600, 700), (700, 600), (70, 70), (5, 5), (40, 39)])
@pytest.mark.parametrize("rows", [1, 3, 4, 64, 256])
@pytest.mark.parametrize("chunk", [1, 2, 16, 256])
def test_rows_stand_for_all_that_see_a_key(n: int, n_kv: int, rows: int, chunk: int) -> None:
    method, early = subquad.Clustered(chunk=chunk, sinks=0), max(n - n_kv, 0)
    call = call_of(n, n_kv, causal=True)
    numbers, weights = draw(call, [method, subquad.Window()], rows, 0)
    assert numbers.dtype == np.int32
    assert np.all(np.diff(numbers) > 0)
    assert numbers[0] >= early
    assert numbers[-1] < n
    bare = np.isin(numbers, list(method.bare_rows(call)))
    others = n - early - len(method.bare_rows(call))
    assert len(numbers) == min(rows, n - early) or (rows < 4 or rows - rows // 4 > others)
    if rows >= n - early:
        assert np.all(weights == 1)
    if rows >= 4:
        assert weights.sum() == pytest.approx(n - early)
        assert weights[bare].sum() == pytest.approx(len(method.bare_rows(call)))
        assert bare.sum() == min(len(method.bare_rows(call)), max(rows // 4, rows - others))


def test_without_bare_rows_they_are_those_of_an_estimate() -> None:
    for causal, n_kv in ((False, 900), (True, 900), (True, 300)):
        call = call_of(900, n_kv, causal=causal)
        numbers, weights = draw(call, [subquad.Window()], 64, 5)
        assert np.array_equal(numbers, draw_rows(900 - n_kv if causal else 0, 900, 64, 5))
        assert np.array_equal(numbers, sample(call, 64, 5).numbers)
        assert weights == pytest.approx(np.full(64, (n_kv if causal else 900) / 64))


# The bound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_the_bound_is_its_formula(eager: Library, size: float) -> None:
    """On every library, also where squares leave the range of float32; row 0 does not see a key."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 40, 4))
    rows = np.arange(3, 40, 4)
    weights = rng.uniform(1, 5, len(rows))
    noise = rng.standard_normal((2, len(rows), 4))
    with eager.context("float32"):
        args = [eager.array(x, "float32") for x in (q, k, size * v)]
        call = enter(None, dict(zip("qkv", args, strict=True)), causal=True)
        known = sample(call, 1, 0, rows)
        exact = eager.numpy(known.exact)
        found = bounded(known, weights, known.exact + eager.array(0.1 * size * noise, "float32"))
    e, o = ((x**2).sum(-1) * weights for x in (0.1 * noise, exact.astype(float) / size))
    error = np.sqrt(e.sum(-1) / o.sum(-1))
    bound = np.sqrt((e.sum(-1) + 8 * (e - e / weights).max(-1)) / o.sum(-1))
    assert found.error == pytest.approx(error, rel=1e-4)
    assert found.bound == pytest.approx(bound, rel=1e-4)


def test_bounds_of_rows_that_see_nothing_or_are_zero() -> None:
    q, k, v = np.ones((3, 2, 30, 4))
    weights = np.full(3, 10.0)
    hidden = enter(None, {"q": q, "k": k, "v": v}, key_mask=np.array([[False], [True]]) & np.ones(30, bool))
    known = sample(hidden, 3, 0)
    assert bounded(known, weights, known.exact).bound.tolist() == [math.inf, 0.0]
    zero = sample(enter(None, {"q": q, "k": k, "v": 0 * v}), 3, 0)
    assert bounded(zero, weights, zero.exact).bound.tolist() == [0.0, 0.0]
    assert bounded(zero, weights, zero.exact + 1).bound.tolist() == [math.inf, math.inf]
    assert bounded(zero, weights, zero.exact + math.nan).error.tolist() == [math.inf, math.inf]
    narrow = sample(enter(None, {"q": q, "k": k, "v": v[..., :0]}), 3, 0)
    assert bounded(narrow, weights, narrow.exact).bound.tolist() == [0.0, 0.0]


def test_all_rows_are_their_own_bound() -> None:
    """Nothing escapes a sample of all rows: half of the tolerance squared, in one row."""
    assert chosen(Wrong(error=0.05 * math.sqrt(200 / 2), rows=(7,)), n=200) == 0
    assert chosen(Wrong(error=0.05 * math.sqrt(200 / 2), rows=(7,)), n=200, tolerance=0.035) == 1


def test_a_bound_falls_no_faster_than_clusters_are_opened() -> None:
    one = np.array([0.5, 0.1])
    before = [(subquad.Clustered(opened=2), one), (subquad.Clustered(opened=0, chunk=64), 9 * one)]
    assert carried(subquad.Clustered(opened=8), np.array([0.01, 0.3]), before).tolist() == [0.125, 0.3]
    assert carried(subquad.Clustered(opened=0), 0 * one, before).tolist() == [0, 0]
    assert carried(subquad.Window(left=8), 0 * one, [(subquad.Window(left=4), one)]).tolist() == [0, 0]
    closed = [(subquad.Clustered(opened=0), one)]
    assert carried(subquad.Clustered(opened=2), 0 * one, closed).tolist() == [0.25, 0.05]


# Choices that hang on it ---------------------------------------------------------------------------------------------


def test_one_wrong_row_counts_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was sampled: by itself it is an error of 0.04, and with eight more like it one of 0.12."""
    (row,) = draw_rows(0, N, 256, 0)[100:101].tolist()
    wrong = Wrong(error=0.04 * math.sqrt(256), rows=(row,))
    assert chosen(wrong) == 1
    assert chosen(wrong, tolerance=0.11) == 1
    assert chosen(wrong, tolerance=0.12) == 0
    monkeypatch.setattr(error_bounds, "ESCAPED", 0)
    assert chosen(wrong) == 0


def test_a_rung_is_judged_by_those_before_it() -> None:
    """The first errs by 0.3 in all rows, the others, as far as the rows show, not at all."""
    ladder = tuple(Falling(error=0.3, opened=opened) for opened in (0, 2, 4, 8, 16))
    assert chosen(*ladder, tolerance=0.1) == 2  # 0.3 / 4, and the error counts as 0.3 √(1 + 8/256 · 7/8)
    assert chosen(*ladder, tolerance=0.05) == 3
    assert chosen(*ladder[1:], tolerance=0.05) == 0
    assert chosen(ladder[0], subquad.Window(left=N, right=N), tolerance=0.05) == 1  # of another kind


def test_rows_that_a_method_knows_as_its_worst_are_looked_at() -> None:
    """Seven rows that no sample of that seed has are 6 % of the output."""
    missed = np.setdiff1d(np.arange(N), np.concatenate([draw_rows(0, n, r, 0) for n, r in ((N, 256), (N - 7, 249))]))
    rows = tuple(missed[::200][:7].tolist())
    assert chosen(Wrong(error=1.0, rows=rows)) == 0
    assert chosen(Wrong(error=1.0, rows=rows, known=True)) == 1
    assert chosen(Wrong(error=1.0, rows=rows, known=True), tolerance=0.06) == 0


def test_first_rows_of_chunks_are_looked_at() -> None:
    """A head that looks at the key before it: without opened clusters, only the first rows of chunks are wrong."""
    n, rng = 1024, np.random.default_rng(0)
    k, v = rng.choice([-1.0, 1.0], size=(n, 64)), rng.standard_normal((n, 4))
    q = 2 * np.roll(k, 1, axis=0)
    exact = subquad.attention(q, k, v, "exact", causal=True)
    off = np.linalg.norm(subquad.Clustered(opened=0)(q, k, v, causal=True) - exact, axis=-1)
    assert sorted(np.argsort(off)[-3:].tolist()) == [256, 512, 768]
    ladder = (subquad.Clustered(opened=0),)
    for seed in range(20):
        auto = subquad.Auto(ladder=ladder, crossover=1, rows=64, seed=seed, tolerance=0.03)
        assert auto.with_choice(q, k, v, causal=True).choice == 1


@pytest.mark.parametrize("tolerance", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("causal", [False, True])
def test_tolerances_of_real_heads_are_kept(tolerance: float, causal: bool) -> None:
    """Three trained heads, five seeds: none misses by more than a fifth."""
    x = read_sample()
    exact = subquad.attention(x.q, x.k, x.v, "exact", causal=causal)
    outs = {}
    for seed in range(5):
        auto = subquad.Auto(tolerance=tolerance, crossover=1, seed=seed).with_choice(x.q, x.k, x.v, causal=causal)
        choice = np.broadcast_to(auto.choice, len(x.q))
        for head, number in enumerate(choice.tolist()):
            if number not in outs:
                outs[number] = auto.rungs[number](x.q, x.k, x.v, causal=causal)
            off, size = outs[number][head] - exact[head], exact[head]
            assert np.linalg.norm(off) <= 1.2 * tolerance * np.linalg.norm(size)
