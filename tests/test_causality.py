"""Causality: a later key changes nothing in an earlier row, not even the rounding."""

from __future__ import annotations

import numpy as np
import pytest
from rows.libraries import Library, relative_error, tolerance
from rows.methods import CAUSAL, MAIN_CAUSAL, METHODS, Case, D, Row, rows, seeing

import subquad

N = 150  # with small blocks: two blocks and a ragged one
CASE = Case((2, N, D), (2, N, D), (2, N, 3))


@pytest.mark.parametrize("later", ["other", "huge", "nan", "inf"])
@pytest.mark.parametrize("cut", [1, 64, 100])
@rows(seeing(CAUSAL, "nothing", "place", "places", "arrays"))
def test_future_leaves_the_past_bit_equal(row: Row, cut: int, later: str, small_blocks: None) -> None:
    check_past(Library(), row, cut, [later])


@rows(seeing(MAIN_CAUSAL, "nothing", "place", "places"))
def test_future_leaves_the_past_bit_equal_elsewhere(eager: Library, row: Row, small_blocks: None) -> None:
    check_past(eager, row, 100, ["huge", "nan"])


def check_past(library: Library, row: Row, cut: int, laters: list[str]) -> None:
    (q, k, v, _), arrays = CASE.draw().values(), row.arrays(CASE)

    def changed(x: np.ndarray, later: str) -> np.ndarray:
        past, future = x[:, :cut], x[:, cut:]
        last = {"other": 1.5 * future[:, ::-1], "huge": 1e3 * future}.get(later)
        return np.concatenate([past, np.full_like(future, float(later)) if last is None else last], axis=1)

    given = [(q, k, v, None, arrays), *((q, changed(k, x), changed(v, x), None, arrays) for x in laters)]
    with np.errstate(all="ignore"):  # what is behind the cut may overflow
        found = library.calls(row.call(causal=True), *given, dtype="float64")
    before, *others = (library.numpy(x) for x in found)
    assert np.all(np.isfinite(before))
    for later, after in zip(laters, others, strict=True):
        assert np.array_equal(before[:, :cut], after[:, :cut])
        assert not np.array_equal(before[:, cut:], after[:, cut:])  # the change was seen at all
        if later == "nan" and row.by != "arrays":
            assert np.all(np.isnan(after[:, cut:]))


@rows(seeing(CAUSAL, "hash"))
def test_later_values_leave_the_past_bit_equal(row: Row) -> None:
    """Later keys may move earlier ones to other chunks, as in every form of this method; their values go nowhere."""
    inputs, arrays = CASE.draw(), row.arrays(CASE)
    changed = inputs["v"].copy()
    changed[:, 100:] = np.nan
    before, after = (row.call(causal=True)(inputs["q"], inputs["k"], v, None, arrays) for v in (inputs["v"], changed))
    assert np.array_equal(before[:, :100], after[:, :100])
    assert np.isnan(after[:, 100:]).any()


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("name", ["k", "v"])
def test_finite_numbers_may_have_a_sum_beyond_the_range(eager: Library, name: str, poisoned: bool) -> None:
    """A sum that is not finite does not say that a number is not; nor, beside it, hides one that is not."""
    if not eager.has_values:
        pytest.skip("it has no values")
    q, k, v, _ = CASE.draw().values()
    q[..., 0] = 0  # whatever the keys have there
    expected = subquad.attention(q, k, np.abs(v), "exact", causal=True)
    if name == "k":
        k[..., 0] = 2.0**126
        given = [q, k, np.abs(v)]
    else:
        expected = expected * 2.0**120
        given = [q, k, np.abs(v) * 2.0**120]
    if poisoned:
        given["qkv".index(name)][:, 100, 1] = np.nan
    with eager.context("float32"):
        qkv = eager.arrays(given, "float32")
        out = eager.numpy(subquad.attention(*qkv, "exact", causal=True))
    past = 100 if poisoned else N
    assert relative_error(out[:, :past], expected[:, :past]) <= tolerance("float32")
    reached = slice(None) if name == "k" else 1  # NaN weights reach all columns, a NaN value at least its own
    assert np.isnan(out[:, past:, reached]).all()


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (2, 1, 3)])
def test_rows_of_tensors_before_the_first_key_see_nothing_that_is_not_finite(batch: tuple[int, ...]) -> None:
    """Nine queries of five keys, of which the value of the fourth is NaN: the last two rows see it."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(rng.standard_normal((*batch, n, 4))) for n in (9, 5, 5))
    v[..., 3, :] = torch.nan
    out = subquad.attention(q, k, v, "exact", causal=True)
    assert torch.all(torch.isnan(out[..., 7:, :]))
    assert torch.all(torch.isfinite(out[..., :7, :]))
    assert torch.all(out[..., :4, :] == 0)


@rows(seeing(CAUSAL, "nothing", "place"))
def test_aligned_at_the_end(row: Row) -> None:
    """The last queries alone, against all keys, give the last rows."""
    inputs = CASE.draw()
    arrays = row.arrays(CASE)
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    full = row.call(causal=True)(q, k, v, None, arrays)
    for last in (1, 40):
        assert relative_error(row.call(causal=True)(q[:, -last:], k, v, None, arrays), full[:, -last:]) < 1e-12
    # more queries than keys: the first rows see nothing
    short = row.call(causal=True)(q, k[:, :40], v[:, :40], None, arrays)
    assert np.all(short[:, : N - 40] == 0)
    assert (
        relative_error(short[:, N - 40 :], row.call(causal=True)(q[:, N - 40 :], k[:, :40], v[:, :40], None, arrays))
        < 1e-12
    )


@rows(seeing(CAUSAL, "nothing", "place", "places"))
def test_one_hot_values_read_the_attention_matrix(row: Row, small_blocks: None) -> None:
    """v = 1 finds a wrong denominator; one-hot v finds a wrong key."""
    case = Case((N, D), (N, D), (N, N))
    inputs, arrays = case.draw(), row.arrays(case)
    weights = row.call(causal=True)(inputs["q"], inputs["k"], np.eye(N), None, arrays)
    assert np.all(weights[np.triu_indices(N, 1)] == 0)
    assert np.all(np.diagonal(weights) != 0)
    assert np.max(np.abs(weights.sum(axis=1) - 1)) < 1e-12 * np.abs(weights).sum(axis=1).max()


@rows(
    [row for row in seeing(METHODS, "nothing", "place", "places")
     if row.method != "nystrom" and row.name.partition("-")[2][:6] not in ("random", "arrays")]
)  # fmt: skip
def test_rows_of_weights_sum_to_one(row: Row) -> None:
    case = Case((N, D), (N, D), (N, N), mask="random")
    inputs, arrays = case.draw(), row.arrays(case)
    weights = row.call()(inputs["q"], inputs["k"], np.eye(N), inputs["key_mask"], arrays)
    assert np.all(weights[:, ~inputs["key_mask"]] == 0)
    assert np.max(np.abs(weights.sum(axis=1) - 1)) < 1e-12 * np.abs(weights).sum(axis=1).max()


def test_causal_differs_from_bidirectional() -> None:
    for row in MAIN_CAUSAL:
        if row.method == "clustered" or "rest" in row.options:  # the last row has other clusters in causal use
            continue
        inputs, arrays = CASE.draw(), row.arrays(CASE)
        call = [inputs[name] for name in ("q", "k", "v")]
        both, past = (row.call(causal=causal)(*call, None, arrays) for causal in (False, True))
        assert relative_error(both[:, -1], past[:, -1]) < 1e-12
        assert relative_error(both[:, 0], past[:, 0]) > 1e-3
