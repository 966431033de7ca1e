"""The matrix of weights is the one that the output is made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Library, Torch, relative_error, tolerance
from rows.methods import MAIN, Case, D, Row, named, rows, seeing

import subquad
from subquad.attention import weights

N = 70
SOME = [3, 69, 0, 3, 40]


def drawn(case: Case) -> list[np.ndarray]:
    return [case.draw()[name] for name in ("q", "k", "v")]


def test_a_fit_to_values_has_no_matrix_until_its_ridge_is_given() -> None:
    q, k, v = drawn(Case((N, D), (N, D), (N, 3)))
    options = {"num_landmarks": 6, "landmarks": "kmeans", "pinv": "ridge-fit"}
    with pytest.raises(NotImplementedError, match="depend on the values, by which λ is chosen; give it, as ridge"):
        subquad.attention_weights(q, k, "nystrom", **options)
    found = subquad.attention_weights(q, k, "nystrom", ridge=0.1, **options)
    assert relative_error(found @ v, subquad.attention(q, k, v, "nystrom", ridge=0.1, **options)) < 1e-11


@pytest.mark.parametrize("chosen", [None, SOME])
@rows([row for row in MAIN if row.object().why_no_matrix() is None])
def test_times_values_is_the_output(row: Row, chosen: list[int] | None) -> None:
    """With grouped queries, a mask, and keys of another length; also for chosen rows of a causal call."""
    for case in (
        Case((2, 4, N, D), (2, 2, N, D), (2, 2, N, 3), mask="heads"),
        Case((N, D), (90, D), (90, 3)),
        Case((N, D), (50, D), (50, 3)),
    ):
        q, k, v = drawn(case)
        mask = case.draw()["key_mask"]
        for causal in row.forms:
            found = subquad.attention_weights(
                q, k, row.method, rows=chosen, causal=causal, key_mask=mask, **row.options
            )
            out = row.call(causal=causal)(q, k, v, mask, {})
            spread = v if v.ndim == 2 else np.repeat(v, 2, axis=1)
            hidden = mask is not None and np.broadcast_to(
                ~mask if mask.ndim == 1 else np.repeat(~mask, 2, axis=1)[..., None, :], found.shape
            )
            assert relative_error(found @ spread, out if chosen is None else out[..., chosen, :]) < 1e-11
            assert hidden is False or np.all(found[hidden] == 0)


@rows(seeing(MAIN, "place", "places", "hash") + named("exact"))
def test_rows_are_those_of_an_average(row: Row) -> None:
    q, k, _ = drawn(Case((N, D), (N, D), (N, 3)))
    found = subquad.attention_weights(q, k, row.method, **row.options)
    total = found.sum(axis=-1)
    assert found.min() >= 0
    assert np.all((np.abs(total - 1) < 1e-12) | ((total == 0) & (row.by == "hash")))


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = drawn(Case((3, 200, D), (3, 200, D), (3, 200, 3)))
    whole = subquad.attention_weights(q, k, causal=True)
    monkeypatch.setattr(weights, "ELEMENTS", 1)
    widths: list[int] = []
    call = subquad.Exact.__call__

    def watched(self: Any, q: Any, k: Any, v: Any, /, **given: Any) -> Any:
        widths.append(v.shape[-1])
        return call(self, q, k, v, **given)

    monkeypatch.setattr(subquad.Exact, "__call__", watched)
    assert relative_error(subquad.attention_weights(q, k, causal=True), whole) < 1e-14
    assert widths == [64, 64, 64, 8]


def test_exact_computes_the_rows_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = drawn(Case((N, D), (N, D), (N, 3)))
    q[5] = np.nan  # a query that is not asked for
    seen: list[int] = []
    call = subquad.Exact.__call__
    monkeypatch.setattr(
        subquad.Exact,
        "__call__",
        lambda self, q, *rest, **given: seen.append(q.shape[-2]) or call(self, q, *rest, **given),
    )
    found = subquad.attention_weights(q, k, rows=SOME, causal=True)
    assert seen == [4]  # one of them is asked for twice
    assert np.isfinite(found).all()
    assert np.array_equal(found > 0, np.arange(N) <= np.array(SOME)[:, None])


def test_rows_of_any_kind(eager: Library) -> None:
    q, k, _ = drawn(Case((2, N, D), (2, N, D), (2, N, 3)))
    expected = subquad.attention_weights(q, k, causal=True)[:, SOME]
    with eager.context("float64"):
        own = eager.array(np.array(SOME, np.int32), "float64")
    for given in (SOME, tuple(SOME), np.array(SOME), own):
        out = eager.call(
            lambda q, k, given=given: subquad.attention_weights(q, k, rows=given, causal=True), q, k, dtype="float64"
        )
        assert relative_error(eager.numpy(out), expected) < 1e-12
    assert subquad.attention_weights(q, k, rows=range(2, 9)).shape == (2, 7, N)
    assert subquad.attention_weights(q, k, rows=[]).shape == (2, 0, N)
    assert subquad.attention_weights(q, k[:, :0]).shape == (2, N, 0)
    assert subquad.attention_weights(q[:0], k[:0]).shape == (0, N, N)


def test_dtype_and_gradient() -> None:
    torch = pytest.importorskip("torch")
    q, k = (Torch().array(x, "bfloat16") for x in drawn(Case((N, D), (N, D), (N, 3)))[:2])
    found = subquad.attention_weights(q, k)
    assert found.dtype == torch.bfloat16
    exact = subquad.attention_weights(q.double().numpy(), k.double().numpy())
    assert relative_error(found.double().numpy(), exact) < tolerance("bfloat16")
    q, k = (x.double().requires_grad_() for x in (q[:7], k[:7]))
    assert torch.autograd.gradcheck(
        lambda q, k: subquad.attention_weights(q, k, rows=[6, 2], causal=True), (q, k), fast_mode=True
    )


x = np.zeros((6, 4))
ERRORS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "many": (ValueError, "rows names query 6, but there are 6 queries, 0 to 5", lambda: subquad.attention_weights(x, x, rows=[0, 6])),
    "negative": (ValueError, "rows names query -1", lambda: subquad.attention_weights(x, x, rows=[-1])),
    "floats": (TypeError, "rows holds float64, expected integers", lambda: subquad.attention_weights(x, x, rows=[0.0])),
    "bools": (TypeError, "rows holds bool", lambda: subquad.attention_weights(x, x, rows=[True, False])),
    "array-bools": (TypeError, "rows has dtype bool", lambda: subquad.attention_weights(x, x, rows=np.ones(6, bool))),
    "number": (TypeError, "rows must be a sequence or an array of integers, got 3 of type int", lambda: subquad.attention_weights(x, x, rows=3)),
    "text": (TypeError, "rows must be a sequence", lambda: subquad.attention_weights(x, x, rows="3")),
    "axes": (ValueError, r"rows has shape \(1, 2\), expected \(r,\)", lambda: subquad.attention_weights(x, x, rows=[[0, 1]])),
    "list": (TypeError, "q is a list", lambda: subquad.attention_weights([[1.0]], x)),
    "widths": (ValueError, "q has 4 channels", lambda: subquad.attention_weights(x, x[:, :2])),
    "causal": (TypeError, "causal must be True or False", lambda: subquad.attention_weights(x, x, rows=[1], causal=1)),
    "mask": (ValueError, r"key_mask has shape \(5,\)", lambda: subquad.attention_weights(x, x, key_mask=np.ones(5, bool))),
    "nystrom-causal": (NotImplementedError, "no causal form", lambda: subquad.attention_weights(x, x, "nystrom", causal=True)),
    "option": (TypeError, "'exact' has no option 'left'", lambda: subquad.attention_weights(x, x, left=3)),
    "global": (NotImplementedError, "leave global_qkv out", lambda: subquad.attention_weights(
        x, x, "window", global_mask=np.ones(6, bool), global_qkv=(x, x, x))),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_is_wrong(case: str) -> None:
    error, message, call = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


def test_traced_rows_are_refused(jax_library: Jax) -> None:
    with pytest.raises(ValueError, match="rows of a program that is traced have no values"):
        jax_library.call(
            lambda q, r: subquad.attention_weights(q, q, rows=r), x, np.zeros(2, np.int32), dtype="float32"
        )
