"""Features "derf": no bias, the variance of the formula, its minimum, and statistics that are taken or given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows import definitions
from rows.libraries import Jax, Library, relative_error
from rows.methods import Case, D, given_statistics

import subquad

N = 60
CASE = Case((2, 4, N, D), (2, 2, N, D), (2, 2, N, 5), mask="right")
DERF = subquad.Favor(num_features=16, features="derf")


def draw(case: Case = CASE) -> tuple[Any, ...]:
    return tuple(case.draw().values())


def log_second_moment(A: Any, z: Any) -> Any:
    """log E[(φ_q φ_k)²]/K² of one feature in one direction, where x + y = z."""
    return np.log(1 - 4 * A) - np.log(1 - 8 * A) / 2 + (2 * (1 - 4 * A) / (1 - 8 * A) - 1) * z * z


@pytest.mark.parametrize("spread", [0.01, 0.3, 2.0, 40.0])
def test_spread_of_directions_minimises_the_mean_logarithm_of_the_second_moment(spread: float) -> None:
    """In one dimension, where all quantities are numbers, by quadrature over ω and a search over A."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1000, 1)) * [[[spread]], [[1.0]]]
    *_, q_map, k_map, B = (float(x.squeeze()) for x in DERF.with_statistics(q, k, scale=1.0).statistics)
    x, y = q_map * (q - q.mean()), k_map * (k - k.mean())
    assert q_map * k_map == pytest.approx(1)
    assert np.mean(x * x) == pytest.approx(np.mean(y * y))
    S = 1.03 * (np.mean(x * x) + np.mean(y * y))  # with the share of shrinkage
    A = -np.geomspace(1e-6, 1e4, 200001)
    best = A[np.argmin(log_second_moment(A, np.sqrt(S)))]
    assert abs((1 - B * B) / 4 - best) < 1e-3 * abs(best)
    # the formula that was minimised: ∫ N(ω; 0, 1) (f(x) f(y))² dω / exp(2 x y), for one pair
    omega = np.linspace(-30, 30, 200001)
    for z in (0.0, 0.7):
        logs = 4 * best * omega**2 + 2 * B * omega * z - z * z - omega**2 / 2 + np.log(1 - 4 * best)
        moment = np.sum(np.exp(logs)) * (omega[1] - omega[0]) / np.sqrt(2 * np.pi)
        assert np.log(moment) == pytest.approx(log_second_moment((1 - B * B) / 4, z), abs=1e-3)


def test_estimates_have_no_bias_and_the_variance_of_the_formula() -> None:
    """Single features of one pair, by the definition that tests/test_parity.py compares the method with."""
    rng = np.random.default_rng(1)
    d, count = 3, 40000
    q, k, mix = rng.standard_normal((200, d)), rng.standard_normal((200, d)), rng.standard_normal((d, d))
    q, k = 1.2 * q @ mix, 0.8 * k @ mix + 2
    statistics = DERF.with_statistics(q, k, scale=1.0).statistics
    q_mean, k_mean, q_map, k_map, B = statistics
    values, basis = np.linalg.eigh(np.eye(d) - B @ B)
    gains = []
    for one in range(4):
        a, b = q[one] * 0.4 + 0.6 * q_mean, k[one] * 0.4 + 0.6 * k_mean  # peaked pairs would need more features
        kernel = np.exp((a - q_mean) @ (b - k_mean) + (b - k_mean) @ q_mean)
        omega = rng.standard_normal((count, d))
        found = np.array([definitions.derf(a[None], b[None], w[None], 1.0, *statistics).item() for w in omega]) / kernel
        z = (q_map @ (a - q_mean) + k_map @ (b - k_mean)) @ basis
        expected = np.exp(np.sum(log_second_moment(values / 4, z)))
        assert abs(np.mean(found) - 1) < 5 * np.sqrt((expected - 1) / count)
        assert np.mean(found**2) == pytest.approx(expected, rel=0.15)
        gains.append(np.sum((a + b) ** 2) - np.log(expected))  # of FAVOR+: exp(|q + k|²)
    assert min(gains) > 0
    assert np.mean(gains) > 3


def test_output_converges_to_softmax_attention_as_features_grow() -> None:
    q, k, v = (x[0, :2] for x in draw()[:3])
    exact = subquad.attention(q, k, v, "exact", scale=0.1)

    def error(m: int) -> float:
        outs = [subquad.Favor(num_features=m, features="derf", seed=s)(q, k, v, scale=0.1) for s in range(8)]
        return float(np.mean([relative_error(out, exact) for out in outs]))

    few, many = error(64), error(4096)
    assert many < 0.05
    assert 5 < few / many < 13  # 64 times as many features: an eighth of the error


@pytest.mark.parametrize("m", [64, 1024])
def test_error_on_real_activations_of_smaller_logits(m: int) -> None:
    """Statistics lower the error where features can work at all: a quarter of the logits of a trained layer."""
    from subquad.cli.inputs import read_sample

    sample = read_sample()
    q, k, v = (np.asarray(x, np.float64) for x in (sample.q, sample.k, sample.v))
    scale = q.shape[-1] ** -0.5 / 4
    exact = subquad.attention(q, k, v, "exact", scale=scale)

    def error(**options: Any) -> float:
        outs = [subquad.Favor(num_features=m, seed=s, **options)(q, k, v, scale=scale) for s in range(4)]
        return float(np.mean([np.linalg.norm(out - exact) / np.linalg.norm(exact) for out in outs]))

    assert error(features="derf") < 0.9 * error(center=True) < 0.9 * error()


def test_balance_makes_the_output_independent_of_the_units_of_q_and_k() -> None:
    """q·c and k/c have the logits of q and k. Positive features change with c, balanced ones do not."""
    q, k, v, mask = draw()
    assert relative_error(DERF(8 * q, k / 8, v, key_mask=mask), DERF(q, k, v, key_mask=mask)) < 1e-12


def test_with_statistics_is_the_method_it_came_from() -> None:
    q, k, v, mask = draw()
    for method in (DERF, subquad.Favor(num_features=16, center=True)):
        for scale in (None, -0.2):
            fixed = method.with_statistics(q, k, key_mask=mask, scale=scale)
            assert fixed == method.with_statistics(q, k, key_mask=mask, scale=scale) != method
            assert hash(fixed) == hash(method.with_statistics(q, k, key_mask=mask, scale=scale))
            expected = method(q, k, v, key_mask=mask, scale=scale)
            assert relative_error(fixed(q, k, v, key_mask=mask, scale=scale), expected) < 1e-12
            parts = [
                fixed.summarize(k[..., a:b, :], v[..., a:b, :], key_mask=mask[..., a:b], scale=scale)
                for a, b in ((0, 33), (33, N))
            ]
            assert relative_error(fixed.attend(q, fixed.merge(*parts), scale=scale), expected) < 1e-12
            causal = fixed(q, k, v, causal=True, scale=scale)
            state, outs = None, []
            for a, b in ((0, 1), (1, 40), (40, N)):
                out, state = fixed.step(*(x[..., a:b, :] for x in (q, k, v)), state, scale=scale)
                outs.append(out)
            assert relative_error(np.concatenate(outs, axis=-2), causal) < 1e-12


def test_statistics_of_key_heads_serve_all_queries_of_a_group() -> None:
    """Taken from the queries of a group as rows of one head; then features of keys are computed once for each group."""
    q, k, v, _ = draw()
    fixed = DERF.with_statistics(np.reshape(q, (2, 2, 2 * N, D)), k)
    spread = DERF.__class__(
        num_features=16,
        features="derf",
        statistics=tuple(np.repeat(x, 2, axis=-2 if i < 2 else -3) for i, x in enumerate(fixed.statistics)),
    )
    for causal in (False, True):
        assert relative_error(fixed(q, k, v, causal=causal), spread(q, k, v, causal=causal)) < 1e-12
    assert fixed.summarize(k, v)["denominator"].shape == (2, 2, 16, 1)


def test_statistics_of_numpy_serve_every_library(eager: Library) -> None:
    q, k, v, mask = draw()
    fixed = DERF.with_statistics(q, k, key_mask=mask)
    out = eager.call(lambda q, k, v: fixed(q, k, v, causal=True), q, k, v, dtype="float64")
    assert relative_error(eager.numpy(out), fixed(q, k, v, causal=True)) < 1e-12


ROWS: dict[str, Any] = {
    "zeros": lambda x: 0 * x,
    "equal": lambda x: 0 * x + x[..., :1, :],
    "one": lambda x: x[..., :1, :],
    "fewer than d": lambda x: x[..., :3, :],
    "one direction": lambda x: x[..., :1] * np.ones(D),
    "small": lambda x: 1e-30 * x,
    "large": lambda x: 1e12 * x,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("of_k", ROWS)
@pytest.mark.parametrize("of_q", ROWS)
def test_rows_that_do_not_fill_the_space(of_q: str, of_k: str, dtype: Any) -> None:
    """The maps are finite and inverse to each other, whatever the rows; with equal keys the output is the mean of v."""
    q, k = (draw()[i].astype(dtype) for i in (0, 1))
    q, k = ROWS[of_q](q), ROWS[of_k](k)
    v = draw()[2].astype(dtype)[..., : k.shape[-2], :]
    _, _, q_map, k_map, spread = DERF.with_statistics(q, k).statistics
    assert all(bool(np.all(np.isfinite(x))) for x in (q_map, k_map, spread))
    assert np.max(np.abs(q_map @ k_map - np.eye(D))) < 1e5 * np.finfo(dtype).eps
    out = DERF(q, k, v)
    assert np.all(np.isfinite(out))
    if of_k in ("zeros", "equal", "one"):
        mean = np.repeat(np.mean(v, axis=-2, keepdims=True), 2, axis=1)
        assert relative_error(out, np.broadcast_to(mean, out.shape)) < 1e3 * np.finfo(dtype).eps


@pytest.mark.parametrize("rows", ["plain", "equal", "one direction"])
def test_torch_gradients_take_the_statistics_as_constants(rows: str) -> None:
    """Those of the fixed method; finite where eigenvalues are equal and their derivatives do not exist."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x.copy()) for x in draw()[:3])
    if rows != "plain":
        q, k = (torch.from_numpy(np.ascontiguousarray(ROWS[rows](x.numpy()))) for x in (q, k))
    fixed = DERF.with_statistics(q, k)
    found = []
    for method in (DERF, fixed, DERF.with_statistics(q.clone().requires_grad_(), k)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        method(*inputs).square().sum().backward()
        found.append([x.grad.numpy() for x in inputs])
    for own, *others in zip(*found, strict=True):
        assert np.all(np.isfinite(own))
        for other in others:
            assert relative_error(other, own) < 1e-12


def test_torch_gradients_by_given_statistics_are_none() -> None:
    """They are constants wherever they come from, so that a state and a call have one gradient."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in draw()[:3])
    (statistics,) = given_statistics(CASE).values()
    statistics = tuple(torch.from_numpy(x).requires_grad_() for x in statistics)
    assert not subquad.Favor(num_features=16, features="derf", statistics=statistics)(q, k, v).requires_grad


def test_jax_programs_take_and_fix_statistics(jax_library: Jax) -> None:
    with jax_library.context("float64"):
        import jax

        q, k, v = (jax_library.array(x, "float64") for x in draw()[:3])
        fixed = DERF.with_statistics(q, k)
        causal = jax.jit(lambda q, k, v: fixed(q, k, v, causal=True))(q, k, v)
        traced = jax.jit(lambda q, k, v: DERF.with_statistics(q, k)(q, k, v, causal=True))(q, k, v)
        assert relative_error(np.asarray(traced), np.asarray(causal)) < 1e-12
        loss = jax.jit(jax.grad(lambda q, k, method: (method(q, k, v) ** 2).sum(), (0, 1)), static_argnums=2)
        for own, other in zip(loss(q, k, DERF), loss(q, k, fixed), strict=True):
            assert relative_error(np.asarray(own), np.asarray(other)) < 1e-12
        assert all(bool(np.all(np.isfinite(x))) for x in loss(0 * q, 0 * k, DERF))
