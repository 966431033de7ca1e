"""Sliding windows: what a row sees, by place; global keys; and a state of fixed size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Library, relative_error
from rows.methods import Case, D

import subquad

N = 150


def drawn(n: int = N, n_kv: int = 0, batch: tuple[int, ...] = (2,)) -> list[np.ndarray]:
    case = Case((*batch, n, D), (*batch, n_kv or n, D), (*batch, n_kv or n, 3))
    return [case.draw()[name] for name in ("q", "k", "v")]


@pytest.mark.parametrize(("left", "right"), [(N, None), (N - 1, N - 1), (10**9, 10**9)])
def test_a_window_of_all_keys_is_exact(left: int, right: int | None) -> None:
    for shape in ((N, N), (40, N), (N, 40)):
        q, k, v = drawn(*shape)
        for causal in (False, True):
            given = {} if causal else {"right": right}
            out = subquad.attention(q, k, v, "window", left=left, causal=causal, **given)
            assert relative_error(out, subquad.attention(q, k, v, "exact", causal=causal)) < 1e-12


@pytest.mark.parametrize(
    "options", [{"left": 5, "right": 2}, {"left": 70, "right": 0}, {"left": 3, "right": 4, "dilation": 5}]
)
def test_weights_are_those_of_the_window(options: dict[str, int]) -> None:
    """One-hot values read the weights: 0 outside, more than 0 inside, for rows aligned with keys at the ends."""
    step = options.get("dilation", 1)
    for n, n_kv in ((N, N), (40, N), (N, 40)):
        q, k, _ = drawn(n, n_kv)
        weights = subquad.attention(q, k, np.broadcast_to(np.eye(n_kv), (2, n_kv, n_kv)), "window", **options)
        offset = np.arange(n_kv) - (np.arange(n)[:, None] + n_kv - n)
        seen = (offset % step == 0) & (offset >= -options["left"] * step) & (offset <= options["right"] * step)
        assert np.array_equal(weights > 0, np.broadcast_to(seen, weights.shape))


@pytest.mark.parametrize("options", [{"left": 5}, {"left": 5, "right": 0}, {"left": 2, "dilation": 3}])
def test_a_key_out_of_sight_may_be_anything(options: dict[str, int], eager: Library) -> None:
    if isinstance(eager, Jax) and "dilation" not in options:
        return
    q, k, v = drawn()
    spoilt = [x.copy() for x in (k, v)]
    for x in spoilt:
        x[:, 70] = np.nan

    def both(q: Any, k: Any, v: Any, *spoilt: Any) -> Any:
        return (subquad.attention(q, *keys, "window", **options) for keys in ((k, v), spoilt))

    out, got = map(eager.numpy, eager.call(lambda *x: tuple(both(*x)), q, k, v, *spoilt, dtype="float64"))
    step = options.get("dilation", 1)
    offset = 70 - np.arange(N)
    sees = (
        (offset % step == 0)
        & (offset >= -options["left"] * step)
        & (offset <= options.get("right", options["left"]) * step)
    )
    assert np.array_equal(got[:, ~sees], out[:, ~sees])
    assert np.isnan(got[:, sees]).all()


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("size", [1, 4, 40])
def test_steps_are_the_causal_call(eager: Library, size: int, dilation: int) -> None:
    """With a state whose size does not depend on the tokens before."""
    if isinstance(eager, Jax) and (size, dilation) != (40, 3):
        return
    n = 30 if size == 1 else N
    drawn_, method = drawn(n, batch=(2, 3)), subquad.Window(left=6, dilation=dilation)
    mask = np.arange(n) % 7 != 2

    def stream(q: Any, k: Any, v: Any, mask: Any) -> Any:
        state, outs, shapes = None, [], set()
        for i in range(0, n, size):
            part = slice(i, min(i + size, n))
            out, state = method.step(q[..., part, :], k[..., part, :], v[..., part, :], state, key_mask=mask[part])
            outs.append(out)
            shapes.add(tuple((name, tuple(x.shape)) for name, x in state.items()))
        return (*outs, *state.values()), shapes

    found: list[Any] = []

    def outs(*given: Any) -> Any:
        arrays, shapes = stream(*given)
        found.append(shapes)
        return arrays

    *got, _, _, _, _ = eager.call(outs, *drawn_, mask, dtype="float64")
    out = np.concatenate([eager.numpy(x) for x in got], axis=-2)
    assert relative_error(out, method(*drawn_, causal=True, key_mask=mask)) < 1e-12
    assert [len(x) for x in found] == [1]
    assert dict(found[0].pop()) == {
        "keys": (2, 3, 6 * dilation, D),
        "values": (2, 3, 6 * dilation, 3),
        "visible": (2, 3, 6 * dilation, 1),
        "place": (2, 3, 6 * dilation, 1),
    }


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("places", [[0, 1, 2], [0, 4, 5], [[0, 1], [2]]])
def test_a_stream_keeps_all_global_keys(places: list[Any], dilation: int, eager: Library) -> None:
    """Steps of any lengths give the causal call, from a state of fixed size, for global keys that differ by item."""
    if isinstance(eager, Jax):  # a traced program cannot read the place of a token
        return
    q, k, v = drawn(40, batch=(2, 4))
    k, v = k[:, :2], v[:, :2]  # grouped queries
    mask = np.random.default_rng(1).random((2, 1, 40)) < 0.9
    if isinstance(places[0], list):
        of_all = np.stack([np.isin(np.arange(40), own) for own in places])[:, None]
    else:
        of_all = np.isin(np.arange(40), places)
    expected = subquad.Window(left=6, dilation=dilation, global_mask=of_all)(q, k, v, causal=True, key_mask=mask)

    def stream(q: Any, k: Any, v: Any, mask: Any) -> Any:
        method = subquad.Window(left=6, dilation=dilation, global_mask=eager.array(of_all, "bool"))
        state, outs = None, []
        for a, b in ((0, 1), (1, 6), (6, 7), (7, 30), (30, 40)):
            own = [x[..., a:b, :] for x in (q, k, v)]
            out, state = method.step(*own, state, key_mask=mask[..., a:b])
            outs.append(out)
            assert state["keys"].shape[-2] == of_all.sum(axis=-1).max() + 6 * dilation
        return tuple(outs)

    got = eager.call(stream, q, k, v, mask, dtype="float64")
    assert relative_error(np.concatenate([eager.numpy(x) for x in got], axis=-2), expected) < 1e-12


def test_a_global_query_needs_keys_that_are_still_held() -> None:
    q, k, v = drawn(20, batch=())
    method = subquad.Window(left=4, global_mask=np.arange(20) == 12)
    _, state = method.step(q[:10], k[:10], v[:10])
    with pytest.raises(NotImplementedError, match="sees every key, but the state holds the last 4 alone"):
        method.step(q[10:], k[10:], v[10:], state)
    longer = subquad.Window(left=12, global_mask=np.arange(20) == 12)
    _, state = longer.step(q[:10], k[:10], v[:10])
    out, _ = longer.step(q[10:], k[10:], v[10:], state)
    assert relative_error(out, longer(q, k, v, causal=True)[10:]) < 1e-12


def test_a_token_after_many_sees_the_last_alone() -> None:
    """No token before the window leaves a trace, not even NaN."""
    q, k, v = drawn(20, batch=())
    method = subquad.Window(left=4)
    poisoned = [np.where(np.arange(20)[:, None] < 10, np.nan, x) for x in (k, v)]
    _, state = method.step(q[:15], *(x[:15] for x in poisoned))
    out, _ = method.step(q[15:], k[15:], v[15:], state)
    assert np.array_equal(out, method.step(q[15:], k[15:], v[15:], method.step(q[:15], k[:15], v[:15])[1])[0])
    assert relative_error(out, method(q, k, v, causal=True)[15:]) < 1e-12


def test_a_window_of_one_key_keeps_an_empty_state() -> None:
    q, k, v = drawn(9)
    out, state = subquad.Window(left=0).step(q, k, v)
    assert relative_error(out, v) < 1e-15
    assert state["keys"].shape == (2, 0, D)
    assert relative_error(subquad.Window(left=0).step(q, k, v, state)[0], v) < 1e-15


def test_calls_that_a_window_lacks() -> None:
    q, k, v = drawn(9)
    method = subquad.Window(left=4)
    _, state = method.step(q, k, v)
    for call, message in (
        (lambda: method.summarize(k, v), "Window has no summarize"),
        (lambda: method.attend(q, state), "Window has no attend"),
        (lambda: method.merge(state, state), "Window has no merge"),
        (
            lambda: subquad.Window(left=4, global_mask=np.ones(9, bool), global_qkv=(q, k, v)).step(q, k, v),
            "no form with",
        ),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()
    for call, message in (
        (lambda: subquad.Window(left=5).step(q, k, v, state), r"state\['keys'\] ends in \(4, 8\), expected \(5, 8\)"),
        (lambda: method.step(q, k, v[..., :2], state), r"state\['values'\] ends in \(4, 3\), expected \(4, 2\)"),
        (lambda: method.step(q[..., :4, :], k, v, state), "one key per query, got 4 queries and 9 keys"),
        (lambda: subquad.Window(left=4, right=1).step(q, k, v), "right=1 would show later keys in a causal call"),
        (lambda: method.step(q, k, v, {"keys": state["keys"]}), "state holds 'keys', expected"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_global_keys_of_items_are_counted_apart() -> None:
    """One item with none, one with several: each as alone, and a global key within a window counts once."""
    q, k, v = drawn(batch=(4, 2))
    mask = np.zeros((4, 1, N), bool)
    mask[1, 0, 70] = mask[2, 0, ::30] = mask[3] = True
    for causal in (False, True):
        out = subquad.attention(q, k, v, "window", left=5, global_mask=mask, causal=causal)
        for i in range(4):
            alone = subquad.attention(q[i], k[i], v[i], "window", left=5, global_mask=mask[i], causal=causal)
            assert relative_error(out[i], alone) < 1e-13
        assert relative_error(out[0], subquad.attention(q[0], k[0], v[0], "window", left=5, causal=causal)) < 1e-13
        assert relative_error(out[3], subquad.attention(q[3], k[3], v[3], "exact", causal=causal)) < 1e-12
    ones = subquad.attention(q, k, np.ones((4, 2, N, 1)), "window", left=5, global_mask=mask)
    assert np.max(np.abs(ones - 1)) < 1e-13


def test_global_keys_of_another_length_are_seen_by_all() -> None:
    """In cross-attention no query has the place of a global key."""
    q, k, _ = drawn(20, N, batch=())
    mask = np.arange(N) == 3
    weights = subquad.attention(q, k, np.eye(N), "window", left=5, right=0, global_mask=mask)
    offset = np.arange(N) - (np.arange(20)[:, None] + N - 20)
    assert np.array_equal(weights > 0, (offset >= -5) & (offset <= 0) | mask)


def test_rows_of_global_queries_use_their_own_projections() -> None:
    """And no other row does; a global query that is hidden as a key keeps its row."""
    q, k, v = drawn(batch=(2, 2))
    own = [x[::-1, ::-1] * 0.7 for x in (q, k, v)]
    mask, key_mask = np.arange(N) % 50 == 7, np.arange(N) != 57
    given = {"left": 5, "global_mask": mask, "key_mask": key_mask}
    out = subquad.attention(q, k, v, "window", global_qkv=tuple(own), **given)
    plain = subquad.attention(q, k, v, "window", **given)
    assert np.array_equal(out[..., ~mask, :], plain[..., ~mask, :])
    expected = subquad.attention(own[0][..., mask, :], own[1], own[2], "exact", key_mask=key_mask)
    assert relative_error(out[..., mask, :], expected) < 1e-12


def test_global_mask_is_a_constant_of_a_program(jax_library: Jax) -> None:
    """With grouped queries; a traced mask has no values."""
    q, k, v = (Case((4, 40, D), (2, 40, D), (2, 40, 3)).draw()[name] for name in ("q", "k", "v"))
    mask = np.stack([np.arange(40) == 3, np.arange(40) % 9 == 0])
    expected = subquad.attention(q, k, v, "window", left=5, global_mask=mask)
    with jax_library.context("float64"):
        constant = jax_library.array(mask, "float64")
    out = jax_library.call(
        lambda q, k, v: subquad.attention(q, k, v, "window", left=5, global_mask=constant), q, k, v, dtype="float64"
    )
    assert relative_error(jax_library.numpy(out), expected) < 1e-12
    with pytest.raises(ValueError, match="global_mask of a program that is traced has no values"):
        jax_library.call(
            lambda q, mask: subquad.attention(q, q, q, "window", global_mask=mask), q, mask[1], dtype="float64"
        )


x = np.zeros((2, 2, 6, 4))
ones = np.ones
ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "left": (ValueError, "left must be at least 0, got -1", {"left": -1}),
    "left-float": (TypeError, "left must be an integer, got 2.0", {"left": 2.0}),
    "left-none": (TypeError, "left must be an integer, got None", {"left": None}),
    "right": (ValueError, "right must be at least 0", {"right": -1}),
    "dilation": (ValueError, "dilation must be at least 1", {"dilation": 0}),
    "right-causal": (ValueError, "right=2 would show later keys", {"right": 2, "causal": True}),
    "mask-floats": (TypeError, "global_mask has dtype float64, expected bool", {"global_mask": ones(6)}),
    "mask-list": (TypeError, "global_mask is a list", {"global_mask": [True] * 6}),
    "mask-length": (ValueError, r"global_mask has shape \(5,\), expected \(\.\.\., 6\)", {"global_mask": ones(5, bool)}),
    "mask-batch": (ValueError, r"do not broadcast: .*global_mask \[5, 1\]", {"global_mask": ones((5, 1, 6), bool)}),
    "mask-two-ways": (ValueError, r"global_mask has shape \(2, 6\).*global_mask\[:, None, :\]", {"global_mask": ones((2, 6), bool)}),
    "qkv-alone": (ValueError, "global_qkv would have no effect without global_mask", {"global_qkv": (x, x, x)}),
    "qkv-pair": (TypeError, "global_qkv must be a tuple of three arrays", {"global_qkv": (x, x), "global_mask": ones(6, bool)}),
    "qkv-none": (TypeError, r"global_qkv\[1\] is a NoneType", {"global_qkv": (x, None, x), "global_mask": ones(6, bool)}),
    "qkv-integers": (TypeError, "global_k has dtype int64", {"global_qkv": (x, x.astype(int), x), "global_mask": ones(6, bool)}),
    "qkv-rows": (ValueError, r"global_q of global_qkv has shape \(2, 2, 5, 4\), expected \(\.\.\., 6, 4\)",
                 {"global_qkv": (x[..., :5, :], x, x), "global_mask": ones(6, bool)}),
    "qkv-width": (ValueError, r"global_v of global_qkv has shape \(2, 2, 6, 3\), expected \(\.\.\., 6, 4\)",
                  {"global_qkv": (x, x, x[..., :3]), "global_mask": ones(6, bool)}),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_is_wrong(case: str) -> None:
    error, message, options = ERRORS[case]
    with pytest.raises(error, match=message):
        subquad.attention(x, x, x, "window", **options)


def test_shown_options_are_those_given() -> None:
    assert repr(subquad.Window(left=3)) == "Window(left=3, dilation=1, implementation='auto')"
    assert repr(subquad.Window(right=0, global_mask=ones(6, bool))) == (
        "Window(left=256, right=0, dilation=1, global_mask=<(6,) bool>, implementation='auto')"
    )
