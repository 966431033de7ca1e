"""The causal convolution: any split and single steps give its bits, resets select, and all its arguments are checked."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, relative_error, tolerance

import subquad
from subquad.kernels import causal_conv1d as conv_kernel

D = 19  # a vector and a part of one, in float32 and in float64
implementations = pytest.mark.parametrize("implementation", ["auto", "generic"])
Array = np.ndarray


def drawn(n: int, width: int = 4, dtype: str = "float64") -> tuple[Array, Array, Array, Array]:
    """(x, weight, bias, initial state) of two items."""
    rng = np.random.default_rng(n)
    shapes = (2, n, D), (D, width), (D,), (2, width - 1, D)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)  # type: ignore[return-value]


def by_loop(x: Array, weight: Array, bias: Array, state: Array, resets: Array) -> tuple[Array, Array]:
    """(y, state) of single numbers, one after the other."""
    (batch, n, d), width = x.shape, weight.shape[1]
    y, last = np.empty(x.shape), np.zeros(state.shape)
    for b in range(batch):
        for c in range(d):
            past = list(state[b, :, c])
            for t in range(n):
                past = [0.0] * (width - 1) if resets[b, t] else past
                past.append(x[b, t, c])
                total = bias[c] + sum(w * z for w, z in zip(weight[c], past, strict=True))
                y[b, t, c] = total / (1 + np.exp(-total))
                past = past[1:]
            last[b, :, c] = past
    return y, last


@implementations
@pytest.mark.parametrize(("n", "width"), [(1, 4), (2, 4), (63, 4), (70, 2), (5, 9), (9, 1)])
def test_equals_a_loop_over_numbers(n: int, width: int, implementation: str) -> None:
    given = drawn(n, width)
    for rate in (0.0, 0.2, 1.0):
        resets = np.random.default_rng(1).random((2, n)) < rate
        got = conv_kernel(*given, resets, silu=True, reverse=False, implementation=implementation)
        for x, expected in zip(got, by_loop(*given, resets), strict=True):
            assert relative_error(x, expected) <= tolerance("float64")


@implementations
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_any_split_gives_the_same_bits(width: int, dtype: str, reverse: bool, implementation: str) -> None:
    """Chunks shorter than the width too; the state is the last inputs."""
    n = 150  # more than two tasks of the compiled kernel
    x, weight, bias, state = drawn(n, width, dtype)
    options: dict[str, Any] = {"activation": "silu", "reverse": reverse, "implementation": implementation}
    y, last = subquad.causal_conv1d(x, weight, bias, initial_state=state, return_state=True, **options)
    assert np.array_equal(last, (x[:, ::-1] if reverse else x)[:, n + 1 - width :])
    for chunk in (1, 2, 3, 67):
        now, parts = state, {}
        for start in sorted(range(0, n, chunk), reverse=reverse):
            rows = slice(start, start + chunk)
            parts[start], now = subquad.causal_conv1d(
                x[:, rows], weight, bias, initial_state=now, return_state=True, **options
            )
        assert np.array_equal(np.concatenate([parts[start] for start in sorted(parts)], axis=1), y)
        assert np.array_equal(now, last)


@implementations
def test_steps_give_the_same_bits(implementation: str) -> None:
    x, weight, bias, _ = drawn(9, dtype="float32")
    y, last = subquad.causal_conv1d(
        x, weight, bias, activation="swish", return_state=True, implementation=implementation
    )
    state = None
    for t in range(9):
        out, state = subquad.causal_conv1d_step(
            state, x[:, t], weight, bias, activation="swish", implementation=implementation
        )
        assert np.array_equal(out, y[:, t])
    assert np.array_equal(state, last)


@implementations
@pytest.mark.parametrize("reverse", [False, True])
def test_a_reset_is_a_selection(reverse: bool, implementation: str) -> None:
    """Each segment has the bits that it has alone; NaN of another one changes nothing, and no gradient."""
    torch = pytest.importorskip("torch")
    n, edges = 40, [0, 1, 3, 20, 40]
    x, weight, bias, state = drawn(n)
    resets = np.zeros((2, n), bool)
    resets[:, [e - 1 for e in edges[1:]] if reverse else edges[:-1]] = True
    static: dict[str, Any] = {"silu": True, "reverse": reverse, "implementation": implementation}
    y, last = conv_kernel(x, weight, bias, state, resets, **static)
    alone = [conv_kernel(x[:, a:b], weight, bias, None, None, **static) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(np.concatenate([part for part, _ in alone], axis=1), y)
    assert np.array_equal(alone[0 if reverse else -1][1], last)
    mine, gradients = np.r_[0:3, 20:40], []
    for other in (1.0, np.nan):
        x[:, 3:20], state[...] = other, other
        again, _ = conv_kernel(x, weight, bias, state, resets, **static)
        assert np.array_equal(again[:, mine], y[:, mine])
        leaf = torch.from_numpy(x).requires_grad_()
        out, _ = conv_kernel(leaf, *map(torch.from_numpy, (weight, bias, state, resets)), **static)
        out[:, mine].sum().backward()
        gradients.append(leaf.grad[:, mine])
    assert torch.equal(*gradients)


def test_batch_axes_broadcast_and_items_do_not_meet() -> None:
    x, weight, bias, state = drawn(11)
    y = subquad.causal_conv1d(x[:, None], weight, bias, initial_state=np.stack([state[0], state[0]]))
    assert y.shape == (2, 2, 11, D)
    alone = subquad.causal_conv1d(x[1], weight, bias, initial_state=state[0])
    assert np.array_equal(y[1, 0], alone)


def test_layouts_other_than_contiguous_give_the_same_bits() -> None:
    x, weight, bias, state = drawn(30)
    y = subquad.causal_conv1d(x, weight, bias, initial_state=state)
    wide = np.asfortranarray(np.concatenate([x, x], axis=-1))
    found = subquad.causal_conv1d(
        wide[..., :D], np.asfortranarray(weight), bias, initial_state=np.asfortranarray(state)
    )
    assert np.array_equal(found, y)


def test_state_is_no_view_of_the_input() -> None:
    x, weight, bias, _ = drawn(9)
    for implementation in ("auto", "generic"):
        _, state = subquad.causal_conv1d(x, weight, bias, return_state=True, implementation=implementation)
        assert not np.shares_memory(state, x)


@implementations
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 4, 0)], ids=str)
def test_empty(shape: tuple[int, ...], implementation: str) -> None:
    x, weight, state = np.ones(shape), np.ones((shape[2], 4)), np.full((shape[0], 3, shape[2]), 5.0)
    y, last = subquad.causal_conv1d(x, weight, initial_state=state, return_state=True, implementation=implementation)
    assert y.shape == shape
    assert last.shape == state.shape
    if shape[1] == 0:
        assert np.array_equal(last, state)


@implementations
def test_torch_gradcheck(implementation: str) -> None:
    """Of every input through y and the last state, once and twice."""
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x[..., :3] if x.shape[-1] == D else x[:3]).requires_grad_() for x in drawn(5, 3)]

    def conv(x: Any, weight: Any, bias: Any, state: Any) -> Any:
        return subquad.causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, return_state=True, implementation=implementation
        )

    assert torch.autograd.gradcheck(conv, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(conv, tensors, fast_mode=True)


def test_torch_compile_full_graph_and_vmap() -> None:
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    x, weight, bias, state = map(torch.from_numpy, drawn(20))

    def conv(x: Any, state: Any) -> Any:
        return subquad.causal_conv1d(x, weight, bias, activation="silu", initial_state=state)

    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    compiled(ours, state).square().sum().backward()
    conv(theirs, state).square().sum().backward()
    assert relative_error(ours.grad.numpy(), theirs.grad.numpy()) <= tolerance("float64")
    assert torch.allclose(torch.func.vmap(conv)(x, state), conv(x, state), rtol=1e-12, atol=1e-12)


def test_jax_transforms(jax_library: Jax) -> None:
    with jax_library.context("float64"):
        import jax

        x, weight, bias, state = (jax_library.array(a, "float64") for a in drawn(20))

        def loss(x: Any, weight: Any) -> Any:
            return (subquad.causal_conv1d(x, weight, bias, activation="silu", initial_state=state) ** 2).sum()

        compiled, plain = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weight), jax.grad(loss, argnums=(0, 1))(x, weight)
        for a, b in zip(compiled, plain, strict=True):
            assert relative_error(np.asarray(a), np.asarray(b)) <= tolerance("float64")
        mapped = jax.vmap(lambda x, s: subquad.causal_conv1d(x, weight, bias, initial_state=s))(x, state)
        whole = subquad.causal_conv1d(x, weight, bias, initial_state=state)
        assert relative_error(np.asarray(mapped), np.asarray(whole)) <= tolerance("float64")


X, W = np.ones((2, 5, 3)), np.ones((3, 4))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x is a NoneType", lambda: subquad.causal_conv1d(None, W)),
        (TypeError, "weight is a list", lambda: subquad.causal_conv1d(X, W.tolist())),
        (TypeError, "x has dtype int64, expected a real floating", lambda: subquad.causal_conv1d(X.astype(int), W)),
        (TypeError, "bias has dtype complex128", lambda: subquad.causal_conv1d(X, W, np.ones(3, complex))),
        (ValueError, "x has shape (3,), expected (..., n, d)", lambda: subquad.causal_conv1d(X[0, 0], W)),
        (ValueError, "x has shape (), expected (..., d)", lambda: subquad.causal_conv1d_step(None, X[0, 0, 0, ...], W)),
        (ValueError, "weight has shape (4, 3), expected (3, width)", lambda: subquad.causal_conv1d(X, W.T)),
        (ValueError, "drop its middle axis: weight[:, 0, :]", lambda: subquad.causal_conv1d(X, W[:, None])),
        (ValueError, "bias has shape (4,), expected (3,)", lambda: subquad.causal_conv1d(X, W, np.ones(4))),
        (ValueError, "initial_state has shape (2, 4, 3), expected (..., 3, 3)",
         lambda: subquad.causal_conv1d(X, W, initial_state=np.ones((2, 4, 3)))),
        (ValueError, "state has shape (3,), expected (..., 3, 3)",
         lambda: subquad.causal_conv1d_step(np.ones(3), X[:, 0], W)),
        (ValueError, "batch shapes do not broadcast", lambda: subquad.causal_conv1d(X, W, initial_state=np.ones((5, 3, 3)))),
        (ValueError, "activation is 'relu', expected None, 'silu' or 'swish'",
         lambda: subquad.causal_conv1d(X, W, activation="relu")),
        (TypeError, "reverse must be True or False", lambda: subquad.causal_conv1d(X, W, reverse=1)),
        (ValueError, "implementation is 'fast'", lambda: subquad.causal_conv1d(X, W, implementation="fast")),
    ],
)  # fmt: skip
def test_errors(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@implementations
@pytest.mark.parametrize("reverse", [False, True])
def test_documents_and_padding(reverse: bool, implementation: str) -> None:
    """Each document has the bits that it has alone, without its padded steps, whatever these hold."""
    n, rng = 40, np.random.default_rng(0)
    x, weight, bias, state = drawn(n)
    mask, segments = rng.random((2, n)) < 0.6, np.cumsum(rng.random((2, n)) < 0.2, axis=1)
    options: dict[str, Any] = {"activation": "silu", "reverse": reverse, "implementation": implementation}
    y, last, states = subquad.causal_conv1d(
        np.where(mask[..., None], x, np.nan), weight, bias, initial_state=state, mask=mask, segments=segments,
        states_at=(0, 17, n), return_state=True, **options,
    )  # fmt: skip
    for i in range(2):
        here = mask[i]
        alone, after = subquad.causal_conv1d(
            x[i][here], weight, bias, initial_state=state[i], segments=segments[i][here], return_state=True, **options
        )
        assert np.array_equal(y[i][here], alone)
        assert not y[i][~here].any()
        assert np.array_equal(last[i], after)
    assert np.array_equal(states[0], state)
    assert np.array_equal(states[2], last)
    out, after = subquad.causal_conv1d_step(state, x[:, 0], weight, mask=np.asarray([False, True]))
    assert np.array_equal(after[0], state[0])
    assert not out[0].any()
    assert np.array_equal(after[1, -1], x[1, 0])
