"""The state of a chunk of keys is a dict of small arrays, which merges, pickles and continues."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from rows.libraries import Library, relative_error, tolerance
from rows.methods import CASES, CAUSAL, STEPPING, STREAMING, Case, D, Row, named, rows

import subquad

N = 70
CASE = Case((2, N, D), (2, N, D), (2, N, 5), mask="random")
GROUPED = {
    "plain": CASE,
    "a mask per key head": Case((2, 4, N, D), (2, 2, N, D), (2, 2, N, 5), mask="heads"),
    "a mask per query head": Case((2, 4, N, D), (2, 2, N, D), (2, 2, N, 5), mask="query-heads"),
    "three heads a key": Case((2, 6, N, D), (2, 2, N, D), (2, 2, N, 5), mask="query-heads"),
}
grouped = pytest.mark.parametrize("case", GROUPED.values(), ids=GROUPED)
NYSTROM = named("nystrom-arrays")


def state_method(row: Row, case: Case = CASE) -> tuple[Any, dict[str, Any]]:
    """The method object and the keywords of its calls."""
    scale = row.options.get("scale")
    return row.object(**row.arrays(case)), {} if scale is None else {"scale": scale}


def chunks(drawn: dict[str, Any], edges: tuple[int, ...]) -> list[dict[str, Any]]:
    """k, v and key_mask between the edges."""
    return [
        {
            name: drawn[name][..., a:b] if name == "key_mask" else drawn[name][..., a:b, :]
            for name in ("k", "v", "key_mask")
        }
        for a, b in itertools.pairwise(edges)
    ]


def summarize(method: Any, part: dict[str, Any], keywords: dict[str, Any]) -> Any:
    return method.summarize(part["k"], part["v"], key_mask=part["key_mask"], **keywords)


@grouped
@rows(STREAMING)
def test_summarize_merge_attend_is_the_method(row: Row, case: Case) -> None:
    drawn = case.draw()
    method, keywords = state_method(row, case)
    full = method(drawn["q"], drawn["k"], drawn["v"], key_mask=drawn["key_mask"], **keywords)
    state = None
    for part in chunks(drawn, (0, 1, 30, N)):
        state = method.merge(state, summarize(method, part, keywords))
    assert relative_error(method.attend(drawn["q"], state, **keywords), full) < 1e-12


@rows(STREAMING)
def test_merge_is_associative_and_none_is_its_identity(row: Row) -> None:
    """In either order and from either side; one chunk has keys three times as long, so that every maximum moves."""
    drawn = CASE.draw()
    method, keywords = state_method(row)
    drawn["k"][:, 20:50] *= 3
    a, b, c = (summarize(method, part, keywords) for part in chunks(drawn, (0, 20, 50, N)))
    assert method.merge(None, None) is None
    left, right = method.merge(method.merge(a, b), c), method.merge(a, method.merge(b, c))
    swapped = method.merge(c, method.merge(b, a))
    for other in (right, swapped, method.merge(None, left), method.merge(left, None)):
        assert other.keys() == left.keys()
        for name in left:
            # a shift of −inf, before the first key, stays
            assert np.array_equal(np.isinf(other[name]), np.isinf(left[name]))
            finite = np.isfinite(left[name])
            assert relative_error(other[name][finite], left[name][finite]) < 1e-12
    full = method(drawn["q"], drawn["k"], drawn["v"], key_mask=drawn["key_mask"], **keywords)
    assert relative_error(method.attend(drawn["q"], left, **keywords), full) < 1e-12


@rows(STREAMING)
def test_chunk_without_visible_keys_adds_nothing(row: Row) -> None:
    drawn = CASE.draw()
    method, keywords = state_method(row)
    state = summarize(method, drawn, keywords)
    hidden = method.summarize(drawn["k"], drawn["v"], key_mask=np.zeros(N, dtype=bool), **keywords)
    none = method.summarize(drawn["k"][:, :0], drawn["v"][:, :0], **keywords)
    for nothing in (hidden, none):
        for merged in (method.merge(state, nothing), method.merge(nothing, state)):
            assert all(np.array_equal(merged[name], state[name]) for name in state)
        assert np.all(method.attend(drawn["q"], nothing, **keywords) == 0)


@rows(STREAMING)
def test_one_mask_entry_for_all_keys(row: Row) -> None:
    """It broadcasts as in a call, also beyond one block of keys."""
    case = Case((2, 2000, D), (2, 2000, D), (2, 2000, 5))
    drawn = case.draw()
    method, keywords = state_method(row, case)
    few, many = (
        method.summarize(drawn["k"], drawn["v"], key_mask=mask, **keywords)
        for mask in (np.array([[True], [False]]), np.repeat([[True], [False]], 2000, axis=-1))
    )
    assert all(np.array_equal(few[name], many[name]) for name in many)


@rows(STREAMING)
def test_states_are_small_and_picklable(row: Row) -> None:
    drawn = CASES["n=257"].draw()
    method, keywords = state_method(row, CASES["n=257"])
    small, large = (method.summarize(drawn["k"][:n], drawn["v"][:n], **keywords) for n in (10, 257))
    assert isinstance(large, dict)
    assert {name: x.shape for name, x in small.items()} == {name: x.shape for name, x in large.items()}
    copy = pickle.loads(pickle.dumps(large))
    assert np.array_equal(method.attend(drawn["q"], copy, **keywords), method.attend(drawn["q"], large, **keywords))


@rows([*named("favor-center-hyperbolic"), *NYSTROM])
def test_options_per_key_head_are_those_of_all_its_queries(row: Row) -> None:
    """With two groups of two heads, a misread axis would still broadcast."""
    case = Case((2, 4, N, D), (2, 2, N, D), (2, 2, N, 5), mask="heads")
    drawn = case.draw()
    q, k, v, mask = (drawn[name] for name in ("q", "k", "v", "key_mask"))
    ((name, pair),) = row.arrays(Case((2, N, D), (2, N, D), (2, N, 5))).items()
    axis = -2 if name == "center" else -3
    spread = tuple(np.repeat(x, 2, axis=axis) for x in pair)
    few, many = (row.object(**{name: x}) for x in (pair, spread))
    full = many(q, k, v, key_mask=mask)
    assert relative_error(few(q, k, v, key_mask=mask), full) < 1e-12
    for method in (few, many):
        assert relative_error(method.attend(q, method.summarize(k, v, key_mask=mask)), full) < 1e-12


@rows(STREAMING)
def test_state_per_query_head_merges_with_one_per_key_head(row: Row) -> None:
    case = GROUPED["a mask per query head"]
    drawn = case.draw()
    method, keywords = state_method(row, case)
    drawn["key_mask"][..., 30:] = True
    full = method(drawn["q"], drawn["k"], drawn["v"], key_mask=drawn["key_mask"], **keywords)
    first, second = chunks(drawn, (0, 30, N))
    one = summarize(method, first, keywords)
    other = method.summarize(second["k"], second["v"], **keywords)
    for pair in ((one, other), (other, one)):
        assert relative_error(method.attend(drawn["q"], method.merge(*pair), **keywords), full) < 1e-12


@pytest.mark.parametrize("size", [1, 7, 64, 200])
@grouped
@rows(STEPPING)
def test_steps_of_any_size_are_the_causal_method(row: Row, case: Case, size: int) -> None:
    n = 3 if size == 1 else 129
    case = dataclasses.replace(
        case, **{name: (*getattr(case, name)[:-2], n, getattr(case, name)[-1]) for name in "qkv"}
    )
    drawn = case.draw()
    method, keywords = state_method(row, case)
    full = method(drawn["q"], drawn["k"], drawn["v"], causal=True, key_mask=drawn["key_mask"], **keywords)
    state, outs = None, []
    for start in range(0, n, size):
        part = {name: drawn[name][..., start : start + size, :] for name in ("q", "k", "v")}
        part["key_mask"] = drawn["key_mask"][..., start : start + size]
        out, state = method.step(part["q"], part["k"], part["v"], state, key_mask=part["key_mask"], **keywords)
        outs.append(out)
    assert relative_error(np.concatenate(outs, axis=-2), full) < 1e-12
    if row not in STREAMING:
        return
    # the state after the last step is that of all keys
    whole = method.summarize(drawn["k"], drawn["v"], key_mask=drawn["key_mask"], **keywords)
    assert (
        relative_error(method.attend(drawn["q"], state, **keywords), method.attend(drawn["q"], whole, **keywords))
        < 1e-12
    )


@rows(named("favor-seed", "favor-trigonometric", "linear", "nystrom-arrays"))
def test_states_elsewhere(eager: Library, row: Row) -> None:
    """On every library: two chunks, with grouped queries."""
    case = Case((2, 4, N, D), (2, 2, N, D), (2, 2, N, 5))
    drawn, arrays = case.draw(), row.arrays(Case((N, D), (N, D), (N, 5)))
    keywords = {name: x for name, x in row.options.items() if name == "scale"}

    def streamed(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> Any:
        method = row.object(**arrays)
        left, right = (
            method.summarize(k[..., part, :], v[..., part, :], **keywords) for part in (slice(0, 30), slice(30, N))
        )
        out = method.attend(q, method.merge(left, right), **keywords)
        if not row.causal:
            return (out,)
        first, state = method.step(q[..., :30, :], k[..., :30, :], v[..., :30, :], **keywords)
        second, _ = method.step(q[..., 30:, :], k[..., 30:, :], v[..., 30:, :], state, **keywords)
        return out, first, second

    given = [drawn[name] for name in ("q", "k", "v")]
    got = [eager.numpy(x) for x in eager.call(streamed, *given, arrays, dtype="float64")]
    method = row.object(**arrays)
    assert relative_error(got[0], method(*given, **keywords)) < 1e-12
    if row.causal:
        assert relative_error(np.concatenate(got[1:], axis=-2), method(*given, causal=True, **keywords)) < 1e-12


@rows(named("favor-seed", "favor-relu", "linear"))
def test_step_after_a_state_of_smaller_batch(eager: Library, row: Row) -> None:
    """The tokens' mask is per query head, the state per key head; more tokens than one block."""
    drawn = Case((2, 4, 600, D), (2, 2, 600, D), (2, 2, 600, 5), mask="query-heads").draw()
    drawn["key_mask"][..., :10] = True
    method = row.object()
    full = method(drawn["q"], drawn["k"], drawn["v"], causal=True, key_mask=drawn["key_mask"])

    def step(q: Any, k: Any, v: Any, mask: Any) -> Any:
        state = method.summarize(k[..., :10, :], v[..., :10, :])
        return method.step(q[..., 10:, :], k[..., 10:, :], v[..., 10:, :], state, key_mask=mask[..., 10:])[0]

    out = eager.call(step, *drawn.values(), dtype="float64")
    assert relative_error(eager.numpy(out), full[..., 10:, :]) < 1e-12


@rows(named("favor-seed", "favor-trigonometric", "linear", "nystrom"))
@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("float32", "float64"), ("float32", "float16")])
def test_a_state_of_another_precision(eager: Library, row: Row, dtypes: tuple[str, str]) -> None:
    """Both are computed with in the wider one, no less than float32; the output has the dtype of the tokens."""
    if type(eager).__name__ == "Strict" and "float16" in dtypes:
        pytest.skip("it knows no half precision")
    tokens, held = dtypes
    past, (q, k, v) = np.random.default_rng(0).standard_normal((2, 20, D)), np.random.default_rng(1).random((3, 9, D))
    method = row.object() if row.causal else subquad.Nystrom(landmarks=(q[:4], k[:4]))
    state = {name: x.astype(held) for name, x in method.summarize(*past).items()}
    expected = [method.attend(q.astype(tokens).astype(float), {name: x.astype(float) for name, x in state.items()})]
    with eager.context("float64"):
        own = {name: eager.array(x.astype(float), held) for name, x in state.items()}
        given = [eager.array(x, tokens) for x in (q, k, v)]
        if not row.causal:
            method = subquad.Nystrom(landmarks=(given[0][:4, :], given[1][:4, :]))
        got = [method.attend(given[0], own)]
        if row.causal:
            out, after = method.step(*given, own)
            got.append(out)
            rounded = (x.astype(tokens).astype(float) for x in (q, k, v))
            expected.append(method.step(*rounded, {name: x.astype(float) for name, x in state.items()})[0])
            wide = "float64" if "float64" in dtypes else "float32"
            assert {eager.dtype_name(x) for x in after.values()} == {wide}
        for one, other in zip(got, expected, strict=True):
            assert eager.dtype_name(one) == tokens
            assert relative_error(eager.numpy(one), other) < tolerance("float32")


@rows(named("favor-seed", "linear"))
def test_prefill_then_decode(row: Row) -> None:
    """A prompt is summarized, tokens follow one by one: the rows of the causal form on all."""
    drawn = Case((2, 20, D), (2, 20, D), (2, 20, 5)).draw()
    method = row.object()
    full = method(drawn["q"], drawn["k"], drawn["v"], causal=True)
    state = method.summarize(drawn["k"][:, :17], drawn["v"][:, :17])
    for t in range(17, 20):
        token = [drawn[name][:, t : t + 1] for name in ("q", "k", "v")]
        out, state = method.step(*token, state)
        assert relative_error(out[:, 0], full[:, t]) < 1e-12


@rows(named("favor-seed", "favor-trigonometric", "favor-relu", "linear"))
@pytest.mark.parametrize("n", [1, 9])
def test_an_infinite_denominator_gives_0(eager: Library, row: Row, n: int) -> None:
    """A finite sum divided by it, on every library; other items of the batch keep their rows."""
    drawn = Case((2, n, D), (2, n, D), (2, n, 5)).draw()
    method = row.object()
    state = method.summarize(drawn["k"], drawn["v"])
    expected, _ = method.step(drawn["q"], drawn["k"], drawn["v"], state)
    state["denominator"][0, 2] = np.inf

    def both(q: Any, k: Any, v: Any, state: Any) -> Any:
        return method.step(q, k, v, state)[0], method.attend(q, state)

    with np.errstate(all="ignore"):
        found = eager.call(both, drawn["q"], drawn["k"], drawn["v"], state, dtype="float64")
    step, attend = map(eager.numpy, found)
    assert np.all(step[0] == 0)
    assert np.all(attend[0] == 0)
    assert relative_error(step[1], expected[1]) < 1e-12


def test_features_of_either_sign_may_cancel(eager: Library) -> None:
    """In one of two chunks alone, where the row goes on without loss; in all that it sees, where it is 0."""
    k = np.array([[2.0], [1.0], [-1.0], [-2.0], [3.0]])
    q, v = np.ones((5, 1)), np.random.default_rng(0).standard_normal((5, 2))
    total = np.cumsum(k, axis=0)
    expected = np.where(total == 0, 0, np.cumsum(k * v, axis=0) / np.where(total == 0, 1, total))
    method = subquad.Linear(feature_map=lambda x: x)

    def attend(q: Any, k: Any, v: Any) -> Any:
        first, state = method.step(q[:1, :], k[:1, :], v[:1, :])
        second, _ = method.step(q[1:, :], k[1:, :], v[1:, :], state)
        return first, second, method(q, k, v, causal=True), method(q[3:4, :], k[:4, :], v[:4, :])

    *steps, whole, row = map(eager.numpy, eager.call(attend, q, k, v, dtype="float64"))
    for got, wanted in ((np.concatenate(steps), expected), (whole, expected), (row, expected[3:4])):
        assert relative_error(got, wanted) < 1e-14


def test_with_landmarks_is_the_method_it_came_from() -> None:
    """Landmarks of all rows, fixed; then the keys may come in chunks."""
    drawn = Case((2, 4, N, D), (2, 2, N, D), (2, 2, N, 5), mask="right").draw()
    q, k, v, mask = (drawn[name] for name in ("q", "k", "v", "key_mask"))
    for options in (
        {"num_landmarks": 8},
        {"num_landmarks": 8, "landmarks": "uniform", "pinv": "ridge"},
        {"num_landmarks": 8, "landmarks": "kmeans", "kmeans_iterations": 2, "seed": 4},
    ):
        method = subquad.Nystrom(**options)
        fixed = method.with_landmarks(q[:1], k[:1], key_mask=mask[:1])
        expected = method(q[:1], k[:1], v[:1], key_mask=mask[:1])
        assert relative_error(fixed(q[:1], k[:1], v[:1], key_mask=mask[:1]), expected) < 1e-12
        parts = [
            fixed.summarize(k[:1, :, a:b], v[:1, :, a:b], key_mask=mask[:1, :, a:b]) for a, b in ((0, 33), (33, N))
        ]
        assert relative_error(fixed.attend(q[:1], fixed.merge(*parts)), expected) < 1e-12


@pytest.mark.parametrize("landmarks", ["segment-means", "uniform", "kmeans"])
@pytest.mark.parametrize("hidden", [0, 80])
def test_with_landmarks_of_few_rows_takes_each_of_them(landmarks: str, hidden: int) -> None:
    """An empty segment has no mean: as many landmarks as visible rows. An item without keys does not count."""
    drawn = Case((2, 20 + hidden, D), (2, 20 + hidden, D), (2, 20 + hidden, 5)).draw()
    q, k, v = (drawn[name] for name in ("q", "k", "v"))
    mask = np.broadcast_to(np.arange(20 + hidden) < 20, (2, 20 + hidden)).copy() if hidden else None
    every = subquad.Nystrom(landmarks=(q[:, :20], k[:, :20]))
    if hidden:
        mask[1] = False
    fixed = subquad.Nystrom(num_landmarks=32, landmarks=landmarks).with_landmarks(q, k, key_mask=mask)
    assert fixed.landmarks[0].shape == (2, 20, D)
    got, expected = (method.attend(q, method.summarize(k, v, key_mask=mask)) for method in (fixed, every))
    assert relative_error(got, expected) < 1e-12


@rows(CAUSAL)
def test_inputs_of_half_precision_are_kept_in_float32(row: Row) -> None:
    """float16 sums of thousands of features would lose all digits: compute and states are float32."""
    drawn = CASE.draw()
    half = [drawn[name].astype(np.float16) for name in ("q", "k", "v")]
    single = [x.astype(np.float32) for x in half]
    arrays = {name: x if isinstance(x, tuple) else x.astype(np.float32) for name, x in row.arrays(CASE).items()}
    out = row.call(causal=True)(*half, None, arrays)
    assert out.dtype == np.float16
    assert np.array_equal(out, row.call(causal=True)(*single, None, arrays).astype(np.float16))
    if row in STREAMING:
        assert all(x.dtype == np.float32 for x in row.object(**arrays).summarize(*half[1:]).values())
