"""What attention remembers of a call is never taken for another: layouts, masks, options, modes and dtypes take turns."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from rows.kernels import overrides_replaced
from rows.libraries import relative_error

import subquad
from subquad.attention.remembered import KEPT
from subquad.backend import Accepts, Override
from subquad.core.loading import backend_of

pytest.importorskip("llvmlite")

METHODS = {
    "exact": subquad.Exact(),
    "favor": subquad.Favor(num_features=19, seed=1),
    "linear": subquad.Linear(),
    "nystrom": subquad.Nystrom(num_landmarks=4),
    "window": subquad.Window(left=3),
    "bigbird": subquad.BigBird(block_size=4, num_random_blocks=0),  # random blocks depend on the head, which vmap maps
    "lsh": subquad.LSH(bucket_size=4, num_rounds=2),
    "linformer": subquad.Linformer(rank=6),
}


def rows(n: int = 24, d: int = 8, dtype: Any = np.float64, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).standard_normal((3, 2, n, d)).astype(dtype))


def by_columns(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def frozen(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("name", METHODS)
def test_signatures_take_turns(name: str) -> None:
    """Each call is right whatever call was before it, and equal to the one with nothing remembered."""
    method = METHODS[name]
    keep = np.arange(24) < 17
    calls = {
        "plain": lambda: subquad.attention(*rows(), method),
        "again": lambda: subquad.attention(*rows(seed=1), method),
        "mask": lambda: subquad.attention(*rows(), method, key_mask=keep),
        "other mask": lambda: subquad.attention(*rows(), method, key_mask=~keep),
        "scale": lambda: subquad.attention(*rows(), method, scale=0.25),
        "longer": lambda: subquad.attention(*rows(30), method),
        "float32": lambda: subquad.attention(*rows(dtype=np.float32), method),
        "by columns": lambda: subquad.attention(*map(by_columns, rows()), method),
        "frozen": lambda: subquad.attention(*map(frozen, rows()), method),
        "one batch": lambda: subquad.attention(*(x[0] for x in rows()), method),
        "segments": lambda: subquad.attention(*rows(), method, segments=np.arange(24) // 12),
        "NaN": lambda: subquad.attention(
            rows()[0], *(np.where(np.arange(8) == 1, np.nan, x) for x in rows()[1:]), method
        ),
    }
    if method.causal is True:
        calls["causal"] = lambda: subquad.attention(*rows(), method, causal=True)
    expected = {}
    for key, call in calls.items():
        KEPT.clear()
        expected[key] = call()
    for _ in range(3):
        for key, call in calls.items():
            np.testing.assert_allclose(call(), expected[key], rtol=1e-6, atol=1e-6, err_msg=key)


def test_projections_are_read_at_each_call() -> None:
    """Arrays of a method may be changed in place, and need a cast in calls of another dtype."""
    E, F = np.random.default_rng(5).standard_normal((2, 6, 24))
    method = subquad.Linformer(projection=(E, F))
    for _ in range(3):
        for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
            q, k, v = rows(dtype=dtype)
            wide_q, keys, values = q.astype(float), E @ k.astype(float), F @ v.astype(float)
            weights = np.exp(wide_q @ keys.swapaxes(-1, -2) * 8**-0.5)
            expected = weights @ values / weights.sum(-1, keepdims=True)
            assert relative_error(subquad.attention(q, k, v, method), expected) < tolerance
        with pytest.raises(ValueError, match="24 columns for 30 keys"):
            subquad.attention(*rows(30), method)
        E += 0.5
        F *= 2


def test_methods_with_one_signature_take_turns() -> None:
    q, k, v = rows()
    methods = [subquad.Favor(num_features=m, seed=seed) for m in (7, 19) for seed in (0, 1)]
    expected = [subquad.attention(q, k, v, method) for method in methods]
    for _ in range(3):
        for method, out in zip(methods, expected, strict=True):
            assert (subquad.attention(q, k, v, method) == out).all()


def test_directions_that_are_changed_in_place_count() -> None:
    q, k, v = rows()
    omega = np.random.default_rng(3).standard_normal((19, 8))
    method = subquad.Favor(omega=omega)
    for factor in (1.0, 1.0, 1.0, 0.5, 1.0):
        omega *= factor
        assert (method(q, k, v) == subquad.Favor(omega=omega.copy())(q, k, v)).all()
        state = method.summarize(k, v)
        assert (method.attend(q, state) == subquad.Favor(omega=omega.copy()).attend(q, state)).all()
        token = q[:, :1], k[:, :1], v[:, :1], state
        assert (method.step(*token)[0] == subquad.Favor(omega=omega.copy()).step(*token)[0]).all()
    omega[0, 0] = np.nan
    for call in (lambda: method(q, k, v), lambda: method.step(*token)):
        with pytest.raises(ValueError, match="omega holds NaN"):
            call()


def test_nothing_is_kept_for_a_method_that_is_gone() -> None:
    q, k, v = rows()
    method = subquad.Favor(omega=np.random.default_rng(3).standard_normal((19, 8)))
    for _ in range(3):
        method(q, k, v)
    kept = [x for x in KEPT.values() if x.owner() is method and x.made]
    assert kept
    del method
    gc.collect()
    assert not any(x.made for x in kept)


def test_another_override_is_asked_at_once() -> None:
    q, k, v = rows()
    for _ in range(3):
        before = subquad.attention(q, k, v, "exact")

    def run(q: Any, k: Any, v: Any, **keywords: Any) -> Any:
        return np.zeros_like(v)

    override = Override("softmax_attention", "none", run, Accepts(options=frozenset({"key_mask"})))
    with overrides_replaced(backend_of(np), "softmax_attention", override):
        for _ in range(3):
            assert (subquad.attention(q, k, v, "exact") == 0).all()
        assert subquad.explain(subquad.attention, q, k, v, "exact").implementation == "none"
    assert (subquad.attention(q, k, v, "exact") == before).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "method",
    [
        subquad.Linear(),
        subquad.Favor(num_features=21),
        subquad.Favor(omega=np.random.default_rng(1).standard_normal((64, 7))),
        subquad.Favor(num_features=10, features="hyperbolic", center=(np.ones(7) / 2, np.ones(7) / 3)),
    ],
    ids=["linear", "favor", "omega", "center"],
)
@pytest.mark.parametrize("d_v", [5, 70])
def test_a_row_after_a_state_is_that_of_the_whole_sequence(method: Any, dtype: Any, d_v: int) -> None:
    """With hidden keys, a first row that sees none, and queries that share their keys."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, heads, 6, 7)).astype(dtype) for heads in (4, 2))
    v, keep = rng.standard_normal((2, 2, 6, d_v)).astype(dtype), np.asarray([False, True, True, False, True, True])
    wide = (x.astype(np.float64) for x in (q, k, v))
    with overrides_replaced(backend_of(np), "feature_step"):
        expected = subquad.attention(*wide, method, causal=True, key_mask=keep)
    state = None
    for i in range(6):
        at = slice(i, i + 1)
        out, state = method.step(q[..., at, :], k[..., at, :], v[..., at, :], state, key_mask=keep[at])
        assert relative_error(out, expected[..., at, :]) < (1e-13 if dtype is np.float64 else 2e-5)
    assert (expected[..., 0, :] == 0).all()


@pytest.mark.parametrize("scale", [0.3, -0.3])
@pytest.mark.parametrize("m", [64, 21])
@pytest.mark.parametrize("heads", [1, 2, 15])
def test_tokens_of_many_items(scale: float, m: int, heads: int) -> None:
    """Of which some hide their key, one has a key that is not finite, and none has what belongs to another."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, heads, 1, 7))
    keep = np.arange(heads)[:, None] % 4 != 2
    method = subquad.Favor(num_features=m)
    state = method.summarize(*rng.standard_normal((2, heads, 5, 7)), scale=scale)
    if heads > 2:
        k[3, 0, 2] = np.inf
    with overrides_replaced(backend_of(np), "feature_step"):
        expected, after = method.step(q, k, v, state, key_mask=keep, scale=scale)
    for _ in range(3):
        out, found = method.step(q, k, v, state, key_mask=keep, scale=scale)
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-13)
        for name, x in found.items():
            np.testing.assert_allclose(x, after[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["favor", "omega", "linear"])
def test_steps_take_turns(name: str) -> None:
    """Each step is right whatever step was before it, and equal to the one with nothing remembered."""
    omega = np.random.default_rng(3).standard_normal((19, 8))
    method = subquad.Favor(omega=omega) if name == "omega" else METHODS[name]
    q, k, v = (x[:, :1].copy() for x in rows())
    state = method.summarize(*rows(seed=2)[1:])
    turned = dict(reversed(state.items()))
    calls = {
        "plain": lambda: method.step(q, k, v, state),
        "first": lambda: method.step(q, k, v),
        "order": lambda: method.step(q, k, v, turned),
        "hidden": lambda: method.step(q, k, v, state, key_mask=np.asarray([False])),
        "shown": lambda: method.step(q, k, v, state, key_mask=np.asarray([True])),
        "scale": lambda: method.step(q, k, v, state, scale=0.25),
        "others": lambda: method.step(k, q, v, state),
        "by columns": lambda: method.step(q, k, v, {name: by_columns(x) for name, x in state.items()}),
        "frozen": lambda: method.step(*map(frozen, (q, k, v)), state),
        "two": lambda: method.step(*(x[:, :2] for x in rows()), state),
    }
    expected = {}
    for key, call in calls.items():
        KEPT.clear()
        expected[key] = call()
    given = {name: x.copy() for name, x in state.items()}
    for _ in range(3):
        for key, call in calls.items():
            out, after = call()
            np.testing.assert_allclose(out, expected[key][0], rtol=1e-12, err_msg=key)
            for field, x in after.items():
                np.testing.assert_allclose(x, expected[key][1][field], rtol=1e-12, err_msg=key)
                assert (state[field] == given[field]).all()
        with pytest.raises(ValueError, match="one key per query"):
            method.step(q, *rows()[1:], state)
    assert subquad.explain(method.step, q, k, v, state).implementation == "compiled"
    assert subquad.explain(method, *rows()).implementation == "compiled"


@pytest.mark.parametrize("place", ["k", "v", "q", "state"])
def test_a_number_that_is_not_finite_reaches_what_it_does_in_the_generic_form(place: str) -> None:
    q, k, v = (x[:, :1].copy() for x in rows())
    method = subquad.Favor(num_features=19)
    state = method.summarize(*rows(seed=2)[1:])
    {"q": q, "k": k, "v": v, "state": state["numerator"]}[place][0, 0, 3] = np.inf
    got = method.step(q, k, v, state)
    with overrides_replaced(backend_of(np), "feature_step"):
        expected = method.step(q, k, v, state)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-10)
    for name, x in got[1].items():
        np.testing.assert_allclose(x, expected[1][name], rtol=1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_tensors_of_one_signature_take_turns() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.tensor(x) for x in rows())
    omega = torch.randn(19, 8, dtype=torch.float64)
    methods = {**METHODS, "omega": subquad.Favor(omega=omega)}
    for name, method in methods.items():
        expected = torch.tensor(subquad.attention(*(x.numpy() for x in (q, k, v)),
                                                  subquad.Favor(omega=omega.numpy()) if name == "omega" else method))  # fmt: skip
        turned = [x.mT.contiguous().mT for x in (q, k, v)]
        negated = [torch._neg_view(-x) for x in (q, k, v)]
        learned = [x.clone().requires_grad_() for x in (q, k, v)]
        for _ in range(3):
            for given in ((q, k, v), turned, negated, learned):
                out = subquad.attention(*given, method)
                torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9, msg=name)
                assert out.requires_grad == (given is learned)
                with torch.no_grad():
                    assert not subquad.attention(*given, method).requires_grad
            with torch.autocast("cpu"):
                torch.testing.assert_close(subquad.attention(q, k, v, method), expected, rtol=1e-9, atol=1e-9)
            seen = torch.vmap(lambda q, k, v, method=method: subquad.attention(q, k, v, method))(q, k, v)
            torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)
        if name == "omega":
            omega.requires_grad_()
            (subquad.attention(q, k, v, method).sum() + method.step(q, k, v)[0].sum()).backward()
            assert (omega.grad != 0).any()


def test_explain_names_arrays_in_place_of_a_function() -> None:
    q, k, v = rows()
    with pytest.raises(ValueError, match=r"got an array of shape \(2, 24, 8\), float64; .*subquad\.attention"):
        subquad.explain(q, k, v)


def test_directions_of_pytorch_may_change_between_calls() -> None:
    """Their numbers in place, by one and by NaN, and whether they are learned."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.tensor(x) for x in rows())
    omega = torch.randn(19, 8, dtype=torch.float64)
    method = subquad.Favor(omega=omega)
    for _ in range(4):
        before = method(q, k, v)
    omega[3, 2] += 1
    for _ in range(2):
        after = method(q, k, v)
        assert torch.equal(after, subquad.Favor(omega=omega.clone())(q, k, v))
    assert not torch.equal(after, before)
    omega.requires_grad_()
    for _ in range(2):
        (by,) = torch.autograd.grad(method(q, k, v).sum(), omega)
        assert (by != 0).any()
    omega.requires_grad_(False)[0, 0] = torch.nan
    with pytest.raises(ValueError, match="omega holds NaN"):
        method(q, k, v)


def test_short_calls_to_a_few_keys_are_compiled_on_pytorch() -> None:
    torch = pytest.importorskip("torch")
    q, k = torch.randn(2, 64, 8), torch.randn(2, 16, 8)
    chosen = {
        keys: subquad.explain(subquad.attention, q, k[:, :keys], k[:, :keys], "exact").implementation
        for keys in (15, 16)
    }
    assert chosen == {15: "sdpa", 16: "compiled"}


def test_long_calls_alone_ask_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from subquad_torch import host

    asked: list[int] = []

    def threads() -> int:
        asked.append(1)
        return 1

    monkeypatch.setattr(host, "threads", threads)
    method = subquad.Exact(implementation="compiled")
    for n in (40, 508):
        q, k, v = torch.from_numpy(np.stack(rows(n, 24, np.float32)))[:, None].unbind()
        found = [subquad.attention(q, k, v, method) for _ in range(3)]
        asked.clear()
        found.append(subquad.attention(q, k, v, method))
        assert bool(asked) == (n > 40)
        assert all(torch.equal(x, found[0]) for x in found)
