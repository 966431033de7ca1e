"""Gated linear attention in all its forms equals its definition, and what it is a generalisation of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Library, NumPy, NumPyReadOnly, relative_error, tolerance

import subquad
from subquad.registry import SCANS

implementations = pytest.mark.parametrize("implementation", ["auto", "generic"])
definition = SCANS["gated_linear_attention"].reference
Array = np.ndarray
FORMS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {  # shapes of arrays, and options
    "plain": ({}, {}),
    "gla": ({"g": (2, 3, 70, 5)}, {}),
    "retention": ({"g": (3, 1, 1)}, {"scale": 0.7}),
    "rwkv6": ({"g": (2, 3, 70, 5), "bonus": (3, 5), "initial_state": (2, 3, 5, 9)}, {"scale": 1.0}),
    "normalize": ({"g": (2, 3, 70, 1)}, {"normalize": True}),
    "normalize, state": ({"initial_state": (3, 5, 10)}, {"normalize": True, "reverse": True}),
    "reverse": ({"g": (70, 5), "initial_state": (2, 1, 5, 9)}, {"reverse": True}),
}
forms = pytest.mark.parametrize("name", FORMS)


def drawn(name: str, n: int = 70) -> tuple[dict[str, Array], dict[str, Any]]:
    """(arrays, options) of a form: two items of three heads; keys are positive, so that no divisor is near 0."""
    rng = np.random.default_rng(4)
    shapes, options = FORMS[name]
    arrays = {"q": np.abs(rng.standard_normal((2, 3, n, 5))), "k": np.abs(rng.standard_normal((2, 3, n, 5)))}
    arrays["v"] = rng.standard_normal((2, 3, n, 9))
    for key, shape in shapes.items():
        shape = tuple(n if size == 70 else size for size in shape)
        x = rng.standard_normal(shape)
        arrays[key] = -np.abs(x) / 4 if key == "g" else np.abs(x)
    if name == "retention":
        arrays["g"] = np.broadcast_to(arrays["g"], (3, n, 1)).copy()
    return arrays, options


def call(options: dict[str, Any], **more: Any) -> Any:
    """The operator as a function of arrays by name."""

    def run(given: dict[str, Any]) -> Any:
        rest = {key: given[key] for key in ("bonus", "initial_state") if key in given}
        return subquad.gated_linear_attention(
            given["q"], given["k"], given["v"], given.get("g"), **rest, **options, **more
        )

    return run


@forms
def test_equals_its_definition(library: Library, name: str) -> None:
    if isinstance(library, Jax) and name not in ("rwkv6", "normalize, state"):
        pytest.skip("compiling two forms is enough")
    arrays, options = drawn(name)
    for dtype in library.dtypes:
        for implementation in ("auto", "generic"):
            o = library.call(call(options, implementation=implementation), arrays, dtype=dtype)
            rounding = library if dtype == "bfloat16" else NumPy()
            expected = definition(rounding.rounded(arrays, dtype), options)
            assert library.dtype_name(o) == dtype
            assert tuple(o.shape) == expected.shape
            if library.has_values:
                assert relative_error(library.numpy(o), expected) <= tolerance(dtype)


@implementations
@forms
def test_steps_and_chunks_are_the_whole(name: str, implementation: str) -> None:
    arrays, options = drawn(name, 30)
    if options.get("reverse"):
        pytest.skip("steps go forward")
    full, last = call(options, implementation=implementation, return_state=True)(arrays)
    start, outs = arrays.pop("initial_state", None), []
    state, carried, parts = start, start, []
    for t in range(30):
        token = {key: x if key == "bonus" else x[..., t, :] for key, x in arrays.items()}
        o, state = subquad.gated_linear_attention_step(
            state, token["q"], token["k"], token["v"], token.get("g"), bonus=token.get("bonus"), **options,
            implementation=implementation,
        )  # fmt: skip
        outs.append(o)
    for rows in (slice(0, 13), slice(13, 30)):
        part = {key: x if key == "bonus" else x[..., rows, :] for key, x in arrays.items()}
        if carried is not None:
            part["initial_state"] = carried
        o, carried = call(options, implementation=implementation, return_state=True)(part)
        parts.append(o)
    exact = implementation == "auto"
    for got, expected in (
        (np.stack(outs, axis=-2), full), (state, last), (np.concatenate(parts, axis=-2), full), (carried, last),
    ):  # fmt: skip
        assert np.array_equal(got, expected) if exact else relative_error(got, expected) <= 1e-13


def test_strided_inputs_and_halves() -> None:
    """Heads behind time, as transposed views; half precision is computed in float32."""
    arrays, options = drawn("gla")
    o = call(options)(arrays)
    turned = {key: np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 1, 2)), 1, 2) for key, x in arrays.items()}
    assert np.array_equal(call(options)(turned), o)
    half = {key: x.astype(np.float16) for key, x in arrays.items()}
    got, state = call(options, return_state=True)(half)
    assert (got.dtype, state.dtype) == (np.float16, np.float32)
    single, last = call(options, return_state=True)({key: x.astype(np.float32) for key, x in half.items()})
    assert np.array_equal(got, single.astype(np.float16))
    assert np.array_equal(state, last)


def test_an_output_without_weight_is_zero() -> None:
    """And its gradient too: keys that are orthogonal to the query so far."""
    torch = pytest.importorskip("torch")
    q, k = torch.tensor([[1.0, 0], [1, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, 1], [1, 0]])
    v = torch.ones(3, 2, requires_grad=True)
    o = subquad.gated_linear_attention(q, k, v, normalize=True)
    assert torch.equal(o, torch.tensor([[0.0, 0], [0, 0], [1, 1]]))
    o.sum().backward()
    assert torch.isfinite(v.grad).all()


def test_no_step_leaves_the_state(library: Library) -> None:
    if isinstance(library, NumPyReadOnly):
        pytest.skip("as NumPy")
    start = np.random.default_rng(0).standard_normal((2, 3, 4))

    def run(q: Any, v: Any, start: Any) -> Any:
        return subquad.gated_linear_attention(q, q, v, initial_state=start, return_state=True)

    o, state = library.call(run, np.zeros((2, 0, 3)), np.zeros((2, 0, 4)), start, dtype="float32")
    assert tuple(o.shape) == (2, 0, 4)
    if library.has_values:
        assert np.array_equal(library.numpy(state), start.astype(np.float32))


@implementations
@pytest.mark.parametrize("heads", [2, 0])
def test_empty_batches_and_heads(implementation: str, heads: int) -> None:
    """Of the kernel's other callers too: shapes are kept, and gradients are empty."""
    torch = pytest.importorskip("torch")
    batch = 3 if heads == 0 else 0
    q, v = torch.zeros(batch, heads, 6, 5, requires_grad=True), torch.zeros(batch, heads, 6, 3)
    g, u = torch.zeros(batch, heads, 6, 1), torch.zeros(heads, 5)
    how = {"return_state": True, "implementation": implementation}
    x, B = torch.zeros(batch, 6, heads, 3), torch.zeros(batch, 6, 1, 5)
    for o, state in (
        subquad.gated_linear_attention(q, q, v, g, bonus=u, **how),
        subquad.gated_linear_attention(q, q, v, segments=torch.arange(6), **how),
        subquad.wkv(q, q, v, torch.zeros(heads, 5), version=5, u=u, **how),
    ):
        assert (o.shape, state.shape) == (v.shape, (batch, heads, 5, 3))
        assert torch.autograd.grad(o.sum() + state.sum() + q.sum(), q)[0].shape == q.shape
    y, state = subquad.ssd(x, x[..., 0], torch.zeros(heads), B, B, **how)
    assert (y.shape, state.shape) == (x.shape, (batch, heads, 3, 5))


def test_no_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"q has shape \(4, 0\), expected at least one channel"):
        subquad.gated_linear_attention(np.ones((4, 0)), np.ones((4, 0)), np.ones((4, 2)))


@implementations
@forms
def test_torch_gradcheck(name: str, implementation: str) -> None:
    torch = pytest.importorskip("torch")
    arrays, options = drawn(name, 5)
    names = list(arrays)
    given = [torch.from_numpy(x).requires_grad_() for x in arrays.values()]

    def run(*given: Any) -> Any:
        return call(options, implementation=implementation, return_state=True)(dict(zip(names, given, strict=True)))

    assert torch.autograd.gradcheck(run, given, fast_mode=True)


def test_activations_forget_as_retnet_does() -> None:
    q = np.ones((4, 6, 2))
    given, _ = SCANS["gated_linear_attention"].activations(q, q[:2], q[:2])
    assert np.allclose(np.exp(given["g"][:, 0, 0]), [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256])
    assert given["g"].shape == (4, 6, 1)
    assert given["k"].shape == q.shape
