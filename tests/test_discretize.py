"""The rules of discretisation: their definition, their limits at A → 0, and the gate of a gated RNN."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from rows.libraries import LIBRARIES, Jax, Library, NumPy, relative_error, tolerance

import subquad

METHODS = ("zoh", "bilinear", "euler", "mamba")
methods = pytest.mark.parametrize("method", METHODS)


def drawn(complex_: bool) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    A = -rng.uniform(0.1, 30, (5, 3)) + (1j * rng.uniform(-30, 30, (5, 3)) if complex_ else 0)
    return A, rng.standard_normal((5, 3)), rng.uniform(1e-3, 0.1, (2, 7, 5))


def defined(A: np.ndarray, B: np.ndarray, delta: np.ndarray, method: str) -> tuple[np.ndarray, np.ndarray]:
    """The formulas, in double precision."""
    step = delta[..., None]
    if method == "bilinear":
        return (1 + step * A / 2) / (1 - step * A / 2), step / (1 - step * A / 2) * B
    A_bar = 1 + step * A if method == "euler" else np.exp(step * A)
    return A_bar, (np.exp(step * A) - 1) / A * B if method == "zoh" else np.broadcast_to(step * B, A_bar.shape)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("complex_", [False, True])
@methods
def test_equals_the_formulas(library: Library, complex_: bool, method: str) -> None:
    given = drawn(complex_)
    for dtype in library.dtypes:
        if dtype == "bfloat16" and complex_:
            continue
        got = library.call(lambda A, B, delta: subquad.discretize(A, B, delta, method), *given, dtype=dtype)
        rounding = library if dtype == "bfloat16" else NumPy()
        for x, expected in zip(got, defined(*rounding.rounded(given, dtype), method), strict=True):
            assert tuple(np.broadcast_shapes(tuple(x.shape), (2, 7, 5, 3))) == expected.shape
            if not complex_:
                assert library.dtype_name(x) == dtype
            if library.has_values:
                assert relative_error(library.numpy(x), np.broadcast_to(expected, x.shape)) <= tolerance(dtype)


@methods
def test_limits_at_zero(method: str) -> None:
    """Down to the smallest numbers, and through 0: Ā → 1 and B̄ → Δ B, with all digits."""
    A = np.concatenate([-np.logspace(-300, -1, 400), [0.0], np.logspace(-300, -1, 400)])
    delta, B = np.asarray([0.5, 1.0]), np.full_like(A, 3.0)
    A_bar, B_bar = subquad.discretize(A, B, delta, method)
    x = delta[:, None] * A
    if method == "zoh":
        # expm1(x) / x by its series, whose term of order 14 is below 2^-53 of the first for |x| ≤ 1/10
        series = np.ones_like(x)
        for k in range(14, 0, -1):
            series = 1 + x / (k + 1) * series
        assert np.abs(B_bar / (delta[:, None] * B * series) - 1).max() <= 4 * 2.0**-52
    assert np.array_equal(A_bar[:, 400], np.ones(2))
    assert np.array_equal(B_bar[:, 400], 3 * delta)


@pytest.mark.parametrize("complex_", [False, True])
@methods
def test_gradients_at_zero_and_elsewhere(method: str, complex_: bool) -> None:
    """d B̄ / d A = Δ² B / 2 at A = 0 for the hold."""
    torch = pytest.importorskip("torch")
    A = torch.tensor([[0.0, -1e-5, -0.5]], dtype=torch.complex128 if complex_ else torch.float64, requires_grad=True)
    delta, B = torch.tensor([0.5], dtype=torch.float64, requires_grad=True), torch.ones_like(A).detach()
    assert torch.autograd.gradcheck(lambda A, delta: subquad.discretize(A, B, delta, method), (A, delta))
    _, B_bar = subquad.discretize(A, B, delta, method)
    if method in ("zoh", "bilinear"):  # of the others, B̄ does not depend on A
        (found,) = torch.autograd.grad(B_bar.real.sum(), A)
        assert abs(found[0, 0].item() - 0.125) < 1e-12


def test_the_hold_is_the_gate_of_a_gated_rnn() -> None:
    """Theorem 1 of the Mamba paper: A = −1, B = 1, Δ = softplus(z) give h ← (1 − σ(z)) h + σ(z) u."""
    z = np.random.default_rng(0).standard_normal((40, 6)) * 3
    gate, delta, one = 1 / (1 + np.exp(-z)), np.log1p(np.exp(z)), np.ones((6, 1))
    A_bar, B_bar = subquad.discretize(-one, one, delta, "zoh")
    assert relative_error(A_bar[..., 0], 1 - gate) <= 1e-14
    assert relative_error(B_bar[..., 0], gate) <= 1e-14
    # Mamba's own rule has the same forgetting, and softplus(z) in place of the gate
    A_bar, B_bar = subquad.discretize(-one, one, delta, "mamba")
    assert relative_error(A_bar[..., 0], 1 - gate) <= 1e-14
    assert np.array_equal(B_bar[..., 0], delta)


def test_the_hold_is_exact_for_inputs_constant_in_a_step() -> None:
    """Two steps of Δ equal one of 2 Δ; Euler's rule and the trapezoidal one do not have this."""
    A, B, delta = np.asarray([[-0.7 + 2j]]), np.asarray([[1.5 + 0j]]), np.asarray([0.3])
    (a, b), (a2, b2) = (subquad.discretize(A, B, step, "zoh") for step in (delta, 2 * delta))
    assert abs(a * a - a2).max() < 1e-15
    assert abs(a * b + b - b2).max() < 1e-15


def test_mamba_rule_is_that_of_the_selective_scan() -> None:
    rng = np.random.default_rng(0)
    A, B, C = -rng.uniform(0.1, 2, (4, 3)), *rng.standard_normal((2, 4, 3))
    u, delta = rng.standard_normal((1, 20, 4)), rng.uniform(0.1, 1, 4)
    selective = subquad.selective_scan(u, np.broadcast_to(delta, u.shape), A, B, C)
    fixed = subquad.lti_scan(u, A, B, C, delta=delta, discretization="mamba")
    assert relative_error(fixed, selective) <= tolerance("float64")


def test_jax_gradient_at_zero(jax_library: Jax) -> None:
    with jax_library.context("float64"):
        import jax

        A, one = jax_library.array(np.zeros((1, 1)), "float64"), jax_library.array(np.ones(1), "float64")
        found = jax.jit(jax.grad(lambda A: subquad.discretize(A, one[:, None], one, "zoh")[1].sum()))(A)
    assert float(found[0, 0]) == 0.5


ONE = np.ones((3, 2))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "method is 'foh', expected one of 'zoh', 'bilinear'", (ONE, ONE, ONE[:, 0], "foh")),
        (TypeError, "delta is a float, not an array", (ONE, ONE, 0.1, "zoh")),
        (TypeError, "B is a NoneType", (ONE, None, ONE[:, 0], "zoh")),
        (TypeError, "delta has dtype complex128, expected a real", (ONE, ONE, ONE[:, 0] * 1j, "zoh")),
        (ValueError, "A has shape (), expected (..., d, d_state)", (np.ones(()), ONE, ONE[:, 0], "zoh")),
        (ValueError, "do not broadcast: A [3, 2], B [3, 2], delta[..., None] [2, 1]", (ONE, ONE, ONE[0], "zoh")),
    ],
)
def test_errors(error: type[Exception], message: str, arguments: Any) -> None:
    with pytest.raises(error, match=re.escape(message)):
        subquad.discretize(*arguments)
