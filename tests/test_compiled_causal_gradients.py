"""Gradients of compiled causal attention against autograd of its definition in float64: edges, masks, outliers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from compiled_calls import Done, Mapped, causal_product, elu, gradients
from compiled_calls import exponential as exponential_map
from test_compiled_gradients import TOLERANCE, autograd, check, draw
from weighted_means import log_weights, means

import subquad

torch = pytest.importorskip("torch")

# (heads, key heads, n, n_kv, d, d_v, m): below, at and beyond tiles, vectors, panels and blocks; more and fewer keys
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 63, 63, 16, 7, 33),
    (3, 3, 65, 130, 20, 33, 48),
    (2, 1, 130, 65, 8, 16, 70),
    (1, 1, 97, 97, 64, 64, 256),
    (2, 2, 300, 300, 65, 5, 17),
    (1, 1, 20, 5000, 8, 8, 12),
]


def exponential(scale: float, keys: np.ndarray, queries: np.ndarray, mask: np.ndarray | None) -> Any:
    keys, queries = (torch.tensor(x, dtype=torch.float64) for x in (keys, queries))

    def definition(q: Any, k: Any, v: Any) -> Any:
        log_k = k @ keys - abs(scale) / 2 * (k * k).sum(-1, keepdim=True)
        return means(log_weights(q @ queries, log_k), v, mask, causal=True)

    return definition


def linear(phi: Mapped, mask: np.ndarray | None) -> Any:
    def definition(q: Any, k: Any, v: Any) -> Any:
        phi_q, phi_k = (torch.nn.functional.elu(z) + 1 for z in (phi.phi.scale_q * q, phi.phi.scale_k * k))
        return means(torch.log(phi_q @ phi_k.transpose(-1, -2)), v, mask, causal=True)

    return definition


@pytest.mark.parametrize("mask", ["none", "some", "a head sees nothing", "late"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["exponential", "elu"])
@pytest.mark.parametrize("size", SIZES)
def test_gradient_is_that_of_the_definition(size: tuple[int, ...], kind: str, dtype: str, mask: str) -> None:
    heads, shared, n, n_kv, d, d_v, m = size
    q, k, v, keys, grad = draw(
        dtype, (heads, n, d), (shared, n_kv, d), (shared, n_kv, d_v), (d, m), (heads, n, d_v)
    )  # fmt: skip
    keys = keys * np.dtype(dtype).type(d**-0.25)
    some = np.random.default_rng(1).random((shared, n_kv)) < 0.6
    late = np.broadcast_to(np.arange(n_kv) >= n_kv // 2, (shared, n_kv))
    seen = {"none": None, "some": some, "a head sees nothing": some & (np.arange(shared) > 0)[:, None], "late": late}
    if kind == "elu":
        phi = elu(0.7, -1.3)
        definition = linear(phi, seen[mask])
    else:
        phi = exponential_map(keys, -keys[:, ::-1], -(d**-0.5))
        definition = exponential(phi.phi.scale, *phi.weights, seen[mask])
    got = gradients(causal_product(q, k, v, phi=phi, key_mask=seen[mask], save=True), phi, grad)
    check(got, autograd(definition, [q, k, v], grad), dtype)


@pytest.mark.parametrize("growing", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_blocks_of_exponents_far_apart(dtype: str, growing: bool) -> None:
    """What a state holds fades on the way, of the keys forward or of the queries back."""
    n, d, m = 200, 8, 24
    q, k, v, keys, grad = draw(dtype, (1, n, d), (1, n, d), (1, n, d), (d, m), (1, n, d))
    size = np.linspace(0, 8, n, dtype=dtype) if growing else np.linspace(3, 0, n, dtype=dtype)
    k = k * size[:, None]
    phi = exponential_map(keys, keys, 0.1)
    got = gradients(causal_product(q, k, v, phi=phi, save=True), phi, grad)
    expected = autograd(exponential(phi.phi.scale, keys, keys, None), [q, k, v], grad)
    exponent = np.abs(k @ keys).max()  # its last place is a relative error of the weight
    for by, want in zip(got, expected, strict=True):
        assert np.abs(by - want).max() <= np.finfo(dtype).eps * 8 * exponent * np.abs(want).max()


def test_no_gradient_comes_from_the_past() -> None:
    q, k, v, keys, grad = draw("float32", (1, 100, 8), (1, 100, 8), (1, 100, 8), (8, 24), (1, 100, 8))
    grad[:, 50:] = 0
    phi = exponential_map(keys / 2, keys / 2, 0.25)
    by_q, by_k, by_v = gradients(causal_product(q, k, v, phi=phi, save=True), phi, grad)
    assert (by_q[:, 50:] == 0).all()
    assert (by_k[:, 50:] == 0).all()
    assert (by_v[:, 50:] == 0).all()
    assert (by_v[:, 49] != 0).all()


def test_hidden_numbers_are_not_read() -> None:
    q, k, v, keys, grad = draw("float32", (1, 100, 8), (1, 100, 8), (1, 100, 8), (8, 24), (1, 100, 8))
    mask = np.arange(100)[None] % 3 != 0
    phi = exponential_map(keys / 2, keys / 2, 0.25)
    found = []
    for hidden in (0.0, np.nan):
        a, b = (np.where(mask[..., None], x, np.float32(hidden)) for x in (k, v))
        found.append(gradients(causal_product(q, a, b, phi=phi, key_mask=mask, save=True), phi, grad))
        assert (found[-1][1][~mask] == 0).all()
        assert (found[-1][2][~mask] == 0).all()
    assert all(np.array_equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("fault", ["an outlier", "not finite"])
def test_what_the_kernel_cannot_take_is_generic(fault: str) -> None:
    """Rows beyond the range of the compiled forward pass leave no trace, nor do numbers that are not finite."""
    q, k, v, keys = draw("float32", (1, 80, 8), (1, 80, 8), (1, 80, 8), (8, 24))
    if fault == "an outlier":
        k[:, 0] *= 60  # ρ of the first block
    else:
        v[:, 40, 3] = np.nan
    done: Done = causal_product(q, k, v, phi=exponential_map(keys, keys, 0.35), save=True)
    _, _, saved, _ = done.verbs[-1]
    assert saved is None
    found = []
    for dtype in (np.float32, np.float64):
        given = [torch.tensor(x.astype(dtype), requires_grad=True) for x in (q, k, v)]
        out = subquad.attention(*given, subquad.Favor(omega=keys.T.astype(dtype)), causal=True)
        found.append(torch.autograd.grad(out[:, :40].sin().sum(), given))
    for got, want in zip(*found, strict=True):
        assert torch.isfinite(want[:, :40]).all()
        torch.testing.assert_close(got[:, :40].double(), want[:, :40], rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("method", ["favor", "linear"])
def test_torch_differentiates_causal_use_twice(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64, generator=generator).requires_grad_()
    options = {"num_features": 6} if method == "favor" else {}

    def attend(*x: Any) -> Any:
        return subquad.attention(*x, method, causal=True, **options)

    assert subquad.explain(subquad.attention, q, k, v, method, causal=True, **options).implementation == "compiled"
    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, (q, k, v), fast_mode=True)


def test_torch_gradients_with_a_center_or_by_directions_are_generic() -> None:
    q, k, v = (torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    omega = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    center = tuple(x.detach().mean(-2, keepdim=True) for x in (q, k))
    for options in ({"omega": omega}, {"num_features": 6, "center": center}):
        explained = subquad.explain(subquad.attention, q, k, v, "favor", causal=True, **options)
        assert explained.implementation == "generic"
        assert "directions or with a center" in str(explained)
        given = (q, k, v, omega) if "omega" in options else (q, k, v)

        def attend(q: Any, k: Any, v: Any, *omega: Any, options: dict[str, Any] = options) -> Any:
            own = options | ({"omega": omega[0]} if omega else {})
            return subquad.attention(q, k, v, "favor", causal=True, **own)

        assert torch.autograd.gradcheck(attend, given, fast_mode=True)
