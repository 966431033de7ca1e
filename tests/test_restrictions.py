"""Restrictions of a call: packed documents, counts of visible keys, and what changes the logits of exact attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Library, Torch, relative_error, tolerance
from rows.methods import MAIN, Case, D, Row, named, rows

import subquad

N = 30
SPLITS = 50  # random ones, of a test without gradients
CASE = Case((N, D), (N, D), (N, 3))
LOGITS = named("exact", "window", "window-dilated", "window-global")  # whose methods return a log-sum-exp
COUNTING = named("exact", "favor-seed", "favor-hyperbolic", "linear", "window", "bigbird-default", "lsh-default")


def split(rng: np.random.Generator, n: int = N, documents: int | None = None) -> np.ndarray:
    """Numbers of documents, which come in any order, of any lengths."""
    documents = int(rng.integers(1, 7)) if documents is None else documents
    cuts = np.sort(rng.integers(0, n, documents - 1))
    order = rng.permutation(20)[:documents] - 5
    return np.repeat(order, np.diff([0, *cuts, n]))


def splits(count: int) -> Iterator[np.ndarray]:
    """One split that is always tried, and random ones."""
    yield np.repeat([4, -1, 3], [12, 7, 11])
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield split(rng)


def attend(row: Row, q: Any, k: Any, v: Any, *, causal: bool = False, **given: Any) -> Any:
    key_mask = given.pop("key_mask", None)
    return row.call(causal=causal, **given)(q, k, v, key_mask, {})


def by_hand(row: Row, q: Any, k: Any, v: Any, of_q: np.ndarray, of_k: np.ndarray, *, causal: bool) -> list[Any]:
    """(rows, their output) of each document, which is attended to alone."""
    return [
        (of_q == number, attend(row, q[of_q == number], k[of_k == number], v[of_k == number], causal=causal))
        for number in np.unique(of_q)
    ]


def drawn(case: Case = CASE) -> list[np.ndarray]:
    return [case.draw()[name] for name in ("q", "k", "v")]


@rows(MAIN)
def test_a_document_is_as_alone(row: Row) -> None:
    q, k, v = drawn()
    for numbers in splits(SPLITS):
        for causal in row.forms:
            out = attend(row, q, k, v, segments=numbers, causal=causal)
            for own, expected in by_hand(row, q, k, v, numbers, numbers, causal=causal):
                assert relative_error(out[own], expected) < 1e-12


@rows(named("exact", "window", "window-dilated", "bigbird", "lsh", "favor-seed", "nystrom"))
def test_a_document_is_as_alone_elsewhere(eager: Library, row: Row) -> None:
    """The numbers are constants of a traced program, where a method needs to read them."""
    inputs, numbers = drawn(), np.repeat([7, 2, 9], [11, 1, 18])
    causal = row.causal
    with eager.context("float64"):
        constant = eager.array(numbers, "float64")

    def packed(q: Any, k: Any, v: Any) -> Any:
        return attend(row, q, k, v, segments=constant, causal=causal)

    out = eager.numpy(eager.call(packed, *inputs, dtype="float64"))
    for own, expected in by_hand(row, *inputs, numbers, numbers, causal=causal):
        assert relative_error(out[own], expected) < 1e-12


@rows(MAIN)
def test_gradients_of_a_document_are_as_alone(row: Row) -> None:
    torch = pytest.importorskip("torch")
    causal = row.causal

    def gradients(loss: Callable[..., Any]) -> list[np.ndarray]:
        given = [torch.from_numpy(x / 2).requires_grad_() for x in drawn()]
        return [x.numpy() for x in torch.autograd.grad(loss(*given), given)]

    for numbers in splits(SPLITS // 25):

        def packed(q: Any, k: Any, v: Any, numbers: np.ndarray = numbers) -> Any:
            return attend(row, q, k, v, segments=torch.from_numpy(numbers), causal=causal).sin().sum()

        def alone(q: Any, k: Any, v: Any, numbers: np.ndarray = numbers) -> Any:
            return sum(out.sin().sum() for _, out in by_hand(row, q, k, v, numbers, numbers, causal=causal))

        for got, expected in zip(gradients(packed), gradients(alone), strict=True):
            assert relative_error(got, expected) < 1e-11


@pytest.mark.parametrize("garbage", [1e3, np.nan])
@rows(MAIN)
def test_other_documents_move_no_bit(row: Row, garbage: float) -> None:
    for numbers, causal in itertools.product(splits(SPLITS // 5), row.forms):
        out = attend(row, *drawn(), segments=numbers, causal=causal)
        for number in np.unique(numbers):
            others = [np.where((numbers == number)[:, None], x, garbage) for x in drawn()]
            with np.errstate(all="ignore"):
                got = attend(row, *others, segments=numbers, causal=causal)
            assert np.array_equal(got[numbers == number], out[numbers == number])


@pytest.mark.parametrize("poisoned", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("method", ["exact", "window"])
def test_values_of_other_documents_reach_no_gradient(method: str, poisoned: str) -> None:
    """A row that is not finite spoils the gradients of what it sees and what sees it: those of its own document."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("llvmlite")
    numbers = torch.asarray(np.repeat([4, -1, 3], [50, 60, 40]))
    options = {"left": 10} if method == "window" else {}

    def gradients(names: str) -> list[Any]:
        leaves = [torch.asarray(x) for x in np.random.default_rng(1).standard_normal((3, 2, 150, 8))]
        for name, x in zip("qkv", leaves, strict=True):
            if name in names:
                x[:, 60] = np.nan
            x.requires_grad_()
        out = subquad.attention(*leaves, method, segments=numbers, **options)
        out.backward((~out.detach().isnan()).to(out.dtype))
        return [x.grad.numpy() for x in leaves]

    others = np.arange(150) // 50 != 1
    others[100:110] = False
    for got, expected in zip(gradients(poisoned), gradients(""), strict=True):
        assert np.array_equal(got[:, others], expected[:, others])


@rows(MAIN)
def test_the_last_token_of_a_document_moves_no_other(row: Row) -> None:
    for numbers, causal in itertools.product(splits(SPLITS // 5), row.forms):
        own = numbers == numbers[N // 2]
        last = np.flatnonzero(own)[-1]
        q, k, v = drawn()
        changed = [x.copy() for x in (q, k, v)]
        for x in changed:
            x[last] += 1
        out, got = (attend(row, *x, segments=numbers, causal=causal) for x in ((q, k, v), changed))
        others = ~own
        if causal and row.by != "hash":  # the key may move earlier ones to other chunks
            others |= np.arange(N) < last
        assert np.array_equal(got[others], out[others])
        assert np.any(got[last] != out[last])


@rows([row for row in MAIN if row.name != "window-dilated"])
def test_documents_of_queries_and_of_keys(row: Row, rng: np.random.Generator) -> None:
    """Cross-attention: other lengths, documents without keys, and keys of documents without queries."""
    q, k, v = drawn(Case((N, D), (25, D), (25, 3)))
    for _ in range(10):
        of_q, of_k = split(rng, N), split(rng, 25)
        for causal in row.forms:
            out = attend(row, q, k, v, segments=(of_q, of_k), causal=causal)
            for own, expected in by_hand(row, q, k, v, of_q, of_k, causal=causal):
                assert relative_error(out[own], expected) < 1e-12
            assert np.all(out[~np.isin(of_q, of_k)] == 0)
    none = attend(row, q, k[:0], v[:0], segments=(of_q, of_k[:0]))
    assert none.shape == (N, 3)
    assert np.all(none == 0)


def test_numbers_of_two_integer_dtypes(eager: Library) -> None:
    """And of many bits, which differ in the highest ones alone."""
    inputs = drawn()
    wide = np.repeat(np.array([1, 1 + 2**32, 2**62]), 10) if not isinstance(eager, Jax) else np.repeat([1, 2, 3], 10)
    narrow = np.repeat(np.array([1, 3, 2], np.int16), 10)

    def packed(q: Any, k: Any, v: Any, *numbers: Any) -> Any:
        return subquad.attention(q, k, v, "exact", segments=numbers)

    for pair in ((wide, wide.copy()), (wide, narrow)):
        out = eager.numpy(eager.call(packed, *inputs, *pair, dtype="float64"))
        for own, expected in by_hand(named("exact")[0], *inputs, *pair, causal=False):
            assert relative_error(out[own], expected) < 1e-12


@rows(MAIN)
def test_documents_of_each_item(row: Row) -> None:
    """(B, 1, n) beside (B, heads, n, d), with grouped queries."""
    for case in (Case((2, 4, N, D), (2, 2, N, D), (2, 2, N, 3)), Case((2, 4, N, D), (2, 4, N, D), (2, 4, N, 3))):
        q, k, v = drawn(case)
        numbers = np.stack([np.repeat([4, -1, 3], [12, 7, 11]), np.repeat([3, 0], [1, 29])])
        for causal in row.forms:
            out = attend(row, q, k, v, segments=numbers[:, None], causal=causal)
            alone = [attend(row, q[i], k[i], v[i], segments=numbers[i], causal=causal) for i in range(2)]
            assert relative_error(out, np.stack(alone)) < 1e-12


@rows(MAIN)
def test_documents_of_an_empty_batch(row: Row) -> None:
    q, k, v = drawn(Case((0, 2, N, D), (0, 2, N, D), (0, 2, N, 3)))
    assert attend(row, q, k, v, segments=np.zeros((0, 1, N), int)).shape == (0, 2, N, 3)
    assert attend(row, q, k, v, segments=np.zeros(N, int)).shape == (0, 2, N, 3)


@rows(MAIN)
def test_documents_and_a_mask(row: Row) -> None:
    """A hidden key is hidden within its document."""
    q, k, v = drawn()
    numbers, mask = np.repeat([4, -1, 3], [12, 7, 11]), np.arange(N) % 3 > 0
    mask[12:19] = False
    for causal in row.forms:
        out = attend(row, q, k, v, segments=numbers, key_mask=mask, causal=causal)
        for number in (4, -1, 3):
            own = numbers == number
            expected = attend(row, q[own], k[own], v[own], key_mask=mask[own], causal=causal)
            assert relative_error(out[own], expected) < 1e-12
        assert np.all(out[12:19] == 0)


@rows(COUNTING)
def test_counts_of_visible_keys(row: Row, rng: np.random.Generator) -> None:
    """Each query as if it were alone with the keys that it sees."""
    q, k, v = drawn(Case((N, D), (41, D), (41, 3)))
    mask = rng.random(41) < 0.8
    for counts in (np.sort(rng.integers(0, 42, N)), np.full(N, 41), np.zeros(N, int), np.full(N, 17)):
        for key_mask in (None, mask):
            out = attend(row, q, k, v, visible=counts, key_mask=key_mask)
            for i, count in enumerate(counts):
                hidden = None if key_mask is None else key_mask[:count]
                expected = attend(row, q[i : i + 1], k[:count], v[:count], key_mask=hidden)
                assert relative_error(out[i : i + 1], expected) < 1e-12
                assert count or np.all(out[i] == 0)


@rows(COUNTING)
def test_counts_by_place_are_causality(row: Row) -> None:
    for case in (CASE, Case((2, 4, N, D), (2, 2, 41, D), (2, 2, 41, 3))):
        q, k, v = drawn(case)
        counts = np.arange(N) + 1 + k.shape[-2] - N
        right = {"right": 0} if row.method == "window" else {}
        out = subquad.attention(q, k, v, row.method, visible=counts, **(row.options | right))
        assert relative_error(out, attend(row, q, k, v, causal=True)) < 1e-12


@rows(named("exact", "linear", "window"))
def test_counts_of_each_item(row: Row, rng: np.random.Generator) -> None:
    q, k, v = drawn(Case((2, 4, N, D), (2, 2, 41, D), (2, 2, 41, 3)))
    counts = np.sort(rng.integers(0, 42, (2, N)), axis=-1)
    out = attend(row, q, k, v, visible=counts[:, None])
    alone = [attend(row, q[i], k[i], v[i], visible=counts[i]) for i in range(2)]
    assert relative_error(out, np.stack(alone)) < 1e-12


@rows(named("exact", "window"))
def test_counts_within_documents(row: Row) -> None:
    q, k, v = drawn()
    numbers, counts = np.repeat([4, -1, 3], [12, 7, 11]), np.minimum(np.arange(N) + 3, N)
    out = attend(row, q, k, v, segments=numbers, visible=counts)
    for i in range(N):
        keys = (numbers == numbers[i]) & (np.arange(N) < counts[i])
        if row.method == "window":  # counted from the last key that is visible
            keys &= np.abs(np.arange(N) - (counts[i] - 1)) <= row.options["left"]
        expected = subquad.attention(q[i : i + 1], k[keys], v[keys], "exact")
        assert relative_error(out[i : i + 1], expected) < 1e-12


def matrix(
    q: Any, k: Any, v: Any, seen: Any, xp: Any = np, bias: Any = 0.0, softcap: float | None = None, sinks: Any = None
) -> tuple[Any, Any]:
    """(output, log-sum-exp) from explicit matrices (..., n, n_kv)."""
    x = q @ k.swapaxes(-1, -2) * D**-0.5
    x = x if softcap is None else softcap * xp.tanh(x / softcap)
    weights = xp.where(seen, xp.exp(x + bias), 0.0)
    total = weights.sum(-1)[..., None] + (0.0 if sinks is None else xp.exp(sinks)[..., None, None])
    return weights @ v / xp.where(total == 0, 1.0, total), xp.log(total)[..., 0]


@rows(LOGITS)
def test_log_sum_exp(row: Row) -> None:
    """It is that of the keys seen, which the output of one-hot values names."""
    for case in (Case((2, N, D), (2, N, D), (2, N, 3)), Case((2, 4, N, D), (2, 2, 25, D), (2, 2, 25, 3))):
        q, k, v = drawn(case)
        n_kv = k.shape[-2]
        mask = np.arange(n_kv) >= 4
        one = np.broadcast_to(np.eye(n_kv), (*k.shape[:-1], n_kv))
        for causal in (False, True):
            given = {"causal": causal, "key_mask": mask}
            out, lse = attend(row, q, k, v, return_lse=True, **given)
            assert relative_error(out, attend(row, q, k, v, **given)) < 1e-13
            seen = attend(row, q, k, one, **given) > 0
            repeated = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
            with np.errstate(divide="ignore"):
                expected = matrix(q, repeated, repeated, seen)[1]
            assert lse.shape == q.shape[:-1]
            assert np.array_equal(np.isinf(lse), ~seen.any(axis=-1))
            assert np.all(lse[np.isinf(lse)] < 0)
            finite = np.isfinite(lse)
            assert np.max(np.abs(lse[finite] - expected[finite])) < 1e-12
            assert not causal or np.isinf(lse).any()


@rows(LOGITS)
def test_gradient_of_the_log_sum_exp(row: Row) -> None:
    """Where a row sees no key it is 0, and no NaN."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x / 2).requires_grad_() for x in drawn(Case((7, D), (7, D), (7, 2))))
    mask = torch.arange(7) != 0

    def both(q: Any, k: Any, v: Any) -> Any:
        out, lse = attend(row, q, k, v, causal=True, key_mask=mask, return_lse=True)
        return out, lse[1:]

    assert torch.autograd.gradcheck(both, (q, k, v), fast_mode=True)
    out, lse = attend(row, q, k, v, causal=True, key_mask=mask, return_lse=True)
    for x in torch.autograd.grad(out.sum() + torch.where(lse.isinf(), 0.0, lse).sum(), (q, k, v)):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@rows(LOGITS)
def test_log_sum_exp_of_half_precision_is_single(row: Row, dtype: str) -> None:
    library = Torch()
    half = [library.array(x, dtype) for x in drawn()]
    out, lse = attend(row, *half, return_lse=True)
    assert [library.dtype_name(x) for x in (out, lse)] == [dtype, "float32"]
    _, expected = attend(row, *(library.numpy(x) for x in half), return_lse=True)
    assert relative_error(library.numpy(lse), expected) < tolerance("float32")


CHANGES: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {
    "mask": lambda rng: {"mask": rng.random((N, 25)) < 0.5},
    "mask-per-item": lambda rng: {"mask": rng.random((2, 1, N, 25)) < 0.5},
    "mask-of-queries": lambda rng: {"mask": rng.random((4, N, 1)) < 0.8},
    "relative": lambda rng: {"bias": rng.standard_normal((4, N, 25))},
    "alibi": lambda rng: {"bias": -rng.random((4, 1, 1)) * np.arange(25.0)[::-1]},
    "softcap": lambda rng: {"softcap": 0.7},
    "softcap-bias": lambda rng: {"softcap": 1.5, "bias": rng.standard_normal((2, 1, N, 25))},
    "sinks": lambda rng: {"sinks": rng.standard_normal(4)},
    "sinks-per-item": lambda rng: {"sinks": rng.standard_normal((2, 1))},
    "all": lambda rng: {"mask": rng.random((N, 25)) < 0.5, "bias": rng.standard_normal((4, N, 25)), "softcap": 2.0,
                        "sinks": rng.standard_normal(4)},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_logits(name: str, eager: Library, rng: np.random.Generator) -> None:
    if isinstance(eager, Jax) and name not in ("all", "alibi"):
        return  # each shape is compiled
    q, k, v = drawn(Case((2, 4, N, D), (2, 2, 25, D), (2, 2, 25, 3)))
    change, key_mask = CHANGES[name](rng), np.arange(25) % 5 > 0
    arrays = {key: x for key, x in change.items() if key != "softcap"}
    softcap = change.get("softcap")
    places = np.arange(25) <= np.arange(N)[:, None] - 5
    for causal in (False, True):

        def call(q: Any, k: Any, v: Any, mask: Any, arrays: Any, causal: bool = causal) -> Any:
            given = arrays | ({} if softcap is None else {"softcap": softcap})
            return subquad.attention(q, k, v, "exact", causal=causal, key_mask=mask, return_lse=True, **given)

        got = [eager.numpy(x) for x in eager.call(call, q, k, v, key_mask, arrays, dtype="float64")]
        seen = key_mask & change.get("mask", np.array(True)) & (places | (not causal))
        others = {key: x for key, x in change.items() if key != "mask"}
        with np.errstate(divide="ignore"):
            out, lse = matrix(q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1), seen, **others)
        assert relative_error(got[0], out) < 1e-12
        assert np.array_equal(np.isinf(got[1]), np.isinf(lse))
        finite = np.isfinite(lse)
        assert np.max(np.abs(got[1][finite] - lse[finite])) < 1e-12


@pytest.mark.parametrize("name", CHANGES)
def test_gradients_of_changes_of_logits(name: str, rng: np.random.Generator) -> None:
    """Of q, k, v, the bias and the sinks, against those of the explicit matrices."""
    torch = pytest.importorskip("torch")
    inputs, change = drawn(Case((2, 4, N, D), (2, 4, 25, D), (2, 4, 25, 3))), CHANGES[name](rng)
    given = {key: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for key, x in change.items()}

    def gradients(call: Callable[..., Any]) -> list[np.ndarray]:
        leaves = [torch.from_numpy(x.copy()).requires_grad_() for x in inputs]
        mine = {key: x.clone().requires_grad_() if key in ("bias", "sinks") else x for key, x in given.items()}
        out = call(*leaves, **mine)
        leaves += [x for x in mine.values() if torch.is_tensor(x) and x.requires_grad]
        return [x.numpy() for x in torch.autograd.grad(out.sin().sum(), leaves)]

    def explicit(q: Any, k: Any, v: Any, mask: Any = True, **others: Any) -> Any:
        return matrix(q, k, v, torch.as_tensor(mask), torch, **others)[0]

    ours = gradients(lambda q, k, v, **mine: subquad.attention(q, k, v, "exact", **mine))
    for got, expected in zip(ours, gradients(explicit), strict=True):
        assert relative_error(got, expected) < 1e-11


x = np.zeros((6, 4))
zeros = np.zeros


def exact(*arrays: Any, method: str = "exact", **given: Any) -> Callable[[], Any]:
    return lambda: subquad.attention(*(arrays or (x, x, x)), method, **given)


ints = np.zeros(6, int)
short = ints.astype(np.int32)  # JAX has no other by default
wide, deep = 3 * [zeros((2, 3, 6, 4))], 3 * [zeros((2, 2, 6, 4))]
ERRORS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "back": (ValueError, "segments has a number that comes back", exact(segments=np.array([0, 0, 1, 1, 0, 0]))),
    "back-of-keys": (ValueError, r"segments\[1\] has a number that comes back", exact(segments=(ints, np.array([0, 1, 0, 0, 0, 0])))),
    "back-in-one-item": (ValueError, "comes back", exact(*wide, segments=np.array([ints, [0, 1, 0, 0, 0, 0]])[:, None])),
    "segments-floats": (TypeError, "segments has dtype float64, expected integers", exact(segments=zeros(6))),
    "segments-bools": (TypeError, "segments has dtype bool, expected integers", exact(segments=zeros(6, bool))),
    "segments-list": (TypeError, "segments is a list of 6, expected one array", exact(segments=[0] * 6)),
    "segments-of-lists": (TypeError, r"segments\[0\] is a list, not an array", exact(segments=([0] * 6, [0] * 6))),
    "segments-length": (ValueError, r"segments has shape \(5,\), expected \(\.\.\., 6\)", exact(segments=ints[:5])),
    "segments-keys-length": (ValueError, r"segments\[1\] has shape \(5,\), expected \(\.\.\., 6\)", exact(segments=(ints, ints[:5]))),
    "segments-scalar": (ValueError, r"segments has shape \(\)", exact(segments=np.array(1))),
    "segments-cross": (ValueError, "q has 6 rows and k has 5; pass a pair", exact(x, x[:5], x[:5], segments=ints)),
    "segments-batch": (ValueError, r"do not broadcast: .*segments \[5, 1\]", exact(*wide, segments=zeros((5, 1, 6), int))),
    "segments-two-ways": (ValueError, r"segments has shape \(2, 6\).*segments\[:, None, :\]", exact(*deep, segments=zeros((2, 6), int))),
    "visible-two-ways": (ValueError, r"visible has shape \(2, 6\).*visible\[:, None, :\]", exact(*deep, visible=zeros((2, 6), int))),
    "key-mask-two-ways": (ValueError, r"key_mask has shape \(2, 6\).*key_mask\[:, None, :\]", exact(*deep, key_mask=zeros((2, 6), bool))),
    "mask-two-ways": (ValueError, r"mask has shape \(2, 6, 6\).*mask\[:, None, :, :\]", exact(*deep, mask=zeros((2, 6, 6), bool))),
    "visible-causal": (ValueError, "visible counts .* causal=True counts them too", exact(visible=ints, causal=True)),
    "visible-decreases": (ValueError, "visible decreases", exact(visible=np.array([0, 1, 2, 1, 3, 4]))),
    "visible-negative": (ValueError, "visible has numbers from -1 to 6, expected numbers of keys, 0 to 6",
                         exact(visible=np.array([-1, 1, 2, 3, 4, 6]))),
    "visible-many": (ValueError, "visible has numbers from 0 to 7", exact(visible=np.array([0, 1, 2, 3, 4, 7]))),
    "visible-floats": (TypeError, "visible has dtype float64, expected integers", exact(visible=zeros(6))),
    "visible-list": (TypeError, "visible is a list, not an array", exact(visible=[0] * 6)),
    "visible-length": (ValueError, r"visible has shape \(5,\), expected \(\.\.\., 6\)", exact(visible=ints[:5])),
    "mask-floats": (TypeError, "mask has dtype float64, expected bool.*passed as bias", exact(mask=zeros((6, 6)))),
    "mask-keys": (ValueError, r"mask has shape \(6,\), expected \(\.\.\., 6, 6\).*key_mask", exact(mask=zeros(6, bool))),
    "mask-shape": (ValueError, r"mask has shape \(5, 6\), expected", exact(mask=zeros((5, 6), bool))),
    "mask-batch": (ValueError, r"do not broadcast: .*mask \[5\]", exact(*wide, mask=zeros((5, 6, 6), bool))),
    "mask-list": (TypeError, "mask is a list", exact(mask=[[True]])),
    "bias-integers": (TypeError, "bias has dtype int64, expected a real floating", exact(bias=zeros((6, 6), int))),
    "bias-shape": (ValueError, r"bias has shape \(6, 5\), expected", exact(bias=zeros((6, 5)))),
    "bias-batch": (ValueError, r"do not broadcast: .*bias \[5\]", exact(*wide, bias=zeros((5, 6, 6)))),
    "softcap-zero": (ValueError, "softcap must be positive, got 0", exact(softcap=0)),
    "softcap-text": (TypeError, "softcap must be a number", exact(softcap="1")),
    "softcap-nan": (ValueError, "softcap must be finite", exact(softcap=np.nan)),
    "sinks-float": (TypeError, "sinks is a float, not an array", exact(sinks=1.0)),
    "sinks-integers": (TypeError, "sinks has dtype int64", exact(*wide, sinks=zeros(3, int))),
    "sinks-heads": (ValueError, r"do not broadcast: .*sinks \[5\]", exact(*wide, sinks=zeros(5))),
    "lse-integer": (TypeError, "return_lse must be True or False, got 1", exact(return_lse=1)),
    "linear-lse": (NotImplementedError, "Linear cannot take return_lse: its weights are no exponentials", exact(method="linear", return_lse=True)),
    "lsh-lse": (NotImplementedError, "LSH cannot take return_lse: .*or not all of them", exact(method="lsh", return_lse=True)),
    "nystrom-visible": (NotImplementedError, "Nystrom cannot take visible: .*'exact' and 'window' take it", exact(method="nystrom", visible=ints)),
    "dilated-visible": (NotImplementedError, "a window with a dilation counts", exact(method="window", dilation=2, visible=ints)),
    "dilated-pair": (NotImplementedError, "a window with a dilation counts",
                     exact(method="window", dilation=2, segments=(ints, ints.copy()))),
    "favor-both": (NotImplementedError, "Favor takes segments or visible, not both", exact(method="favor", segments=ints, visible=ints)),
    "lsh-both": (NotImplementedError, "LSH takes segments or visible, not both", exact(method="lsh", segments=ints, visible=ints)),
    **{f"{method}-{name}": (NotImplementedError, rf"cannot take {name}: it has no matrix of logits to change; 'exact' takes it",
                            exact(method=method, **{name: given}))
       for method in subquad.METHODS if method != "exact"
       for name, given in (("mask", zeros((6, 6), bool)), ("bias", x), ("softcap", 2.0), ("sinks", zeros(1)))},
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_says_what_is_wrong(case: str) -> None:
    error, message, call = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


def test_shapes_that_can_be_read_in_one_way_are() -> None:
    """(heads, n) where there are other numbers of items, and (B, 1, n) where B is the number of heads."""
    per_head = np.stack([ints, [0, 1, 1, 1, 1, 2], ints])
    q = np.random.default_rng(0).standard_normal((2, 3, 6, 4))
    out = subquad.attention(q, q, q, "exact", segments=per_head)
    for head in range(3):
        expected = subquad.attention(*3 * [q[:, head]], "exact", segments=per_head[head])
        assert relative_error(out[:, head], expected) < 1e-12


def test_bias_of_heads_stays_legal_where_there_are_as_many_items() -> None:
    """A bias of relative places is (heads, n, n_kv) by convention; it is no mask of items."""
    q, bias = (
        np.random.default_rng(0).standard_normal((2, 2, 6, 4)),
        np.random.default_rng(1).standard_normal((2, 6, 6)),
    )
    out = subquad.attention(q, q, q, "exact", bias=bias)
    assert relative_error(out, subquad.attention(q, q, q, "exact", bias=bias[None])) == 0


PROGRAMS = {
    "exact-segments": ("exact", {}, lambda: {"segments": np.repeat(np.array([7, 2, 9], np.int32), [11, 1, 18])}),
    "window-segments": (
        "window",
        {"left": 6},
        lambda: {"segments": np.repeat(np.array([7, 2, 9], np.int32), [11, 1, 18])},
    ),
    "exact-mask": ("exact", {}, lambda: {"mask": np.random.default_rng(0).random((N, N)) < 0.5}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_jax_jit(jax_library: Jax, name: str) -> None:
    """Where the numbers of documents are traced too."""
    method, options, draw = PROGRAMS[name]
    expected = subquad.attention(*drawn(), method, causal=True, **options, **draw())
    out = jax_library.call(
        lambda q, k, v, given: subquad.attention(q, k, v, method, causal=True, **options, **given),
        *drawn(), draw(), dtype="float32",
    )  # fmt: skip
    assert relative_error(jax_library.numpy(out), expected) < tolerance("float32")


@pytest.mark.parametrize("name", PROGRAMS)
def test_torch_compile_full_graph(name: str) -> None:
    torch = pytest.importorskip("torch")
    method, options, draw = PROGRAMS[name]
    expected = subquad.attention(*drawn(), method, causal=True, **options, **draw())
    q, k, v = (torch.from_numpy(x) for x in drawn())
    given = {key: torch.from_numpy(x) for key, x in draw().items()}

    def call(q: Any, k: Any, v: Any, given: dict[str, Any]) -> Any:
        return subquad.attention(q, k, v, method, causal=True, **options, **given)

    torch._dynamo.reset()
    try:
        out = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, given)
    finally:
        torch._dynamo.reset()
    assert relative_error(out.numpy(), expected) < 1e-12


@pytest.mark.parametrize("method", ["linear", "bigbird", "lsh", "nystrom"])
def test_traced_numbers_of_documents_are_refused(jax_library: Jax, method: str) -> None:
    with pytest.raises(NotImplementedError, match="segments of a program that is traced have no values"):
        jax_library.call(
            lambda q, k, v, s: subquad.attention(q, k, v, method, segments=s), x, x, x, short, dtype="float32"
        )


def test_documents_of_grouped_heads() -> None:
    """Numbers for each head: a query head meets the document of its key head, as if it were alone."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 4, 12, 5))
    k, v = k[:2], v[:2]
    ends = (3, 6, 9, 5)  # of the first document of each query head
    of_queries = np.stack([np.arange(12) >= end for end in ends]).astype(int)
    of_keys = np.stack([np.arange(12) >= end for end in (4, 7)]).astype(int)
    out = subquad.attention(q, k, v, "exact", segments=(of_queries, of_keys))
    for head in range(4):
        for number in (0, 1):
            rows, keys = of_queries[head] == number, of_keys[head // 2] == number
            alone = subquad.attention(q[head][rows], k[head // 2][keys], v[head // 2][keys], "exact")
            assert np.allclose(out[head][rows], alone, rtol=0, atol=1e-13)
