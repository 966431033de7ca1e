"""Compiled gradients of attention under JAX, and its transforms, against PyTorch's of the same call in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from interpreter import TWO_DEVICES, python
from rows.libraries import relative_error

import subquad
from subquad.core.loading import backend_of

pytest.importorskip("llvmlite")
torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

MEANS = tuple(np.linspace(-0.5, 0.5, 8) * sign for sign in (1, -1))  # of queries and keys

# (method, options, shape of q, of k)
CALLS = {
    "favor": ("favor", {"num_features": 12}, (2, 4, 40, 8), (2, 2, 50, 8)),
    "centred": ("favor", {"num_features": 12, "center": True}, (2, 4, 40, 8), (2, 1, 50, 8)),
    "causal": ("favor", {"num_features": 12, "causal": True}, (2, 4, 140, 8), (2, 1, 150, 8)),
    "centred causal": ("favor", {"num_features": 12, "center": MEANS, "causal": True}, (2, 1, 40, 8), (2, 1, 40, 8)),
    "linear": ("linear", {}, (2, 4, 40, 8), (1, 4, 50, 8)),
    "causal linear": ("linear", {"causal": True}, (2, 4, 140, 8), (2, 4, 90, 8)),
    "few keys": ("exact", {}, (2, 4, 4200, 8), (2, 2, 40, 8)),
    "few queries": ("exact", {}, (2, 4, 40, 8), (2, 2, 4200, 8)),
    "nystrom": ("nystrom", {"num_landmarks": 30}, (1, 4, 600, 8), (1, 2, 600, 8)),
}
COMPILED = {
    "favor": ["attend_gradient", "summarize_gradient"],
    "causal linear": ["step_gradient"],
    "few keys": ["attend_gradient"],
    "few queries": ["summarize_gradient"],
}


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with jax.enable_x64(True):
        yield


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in shapes]


def of_torch(loss: Callable[..., Any], *arrays: np.ndarray) -> list[np.ndarray]:
    given = [torch.tensor(x, requires_grad=True) for x in arrays]
    return [x.numpy() for x in torch.autograd.grad(loss(*given), given)]


def same(got: Any, expected: Any, tolerance: float = 1e-11) -> None:
    for x, y in zip(got, expected, strict=True):
        assert relative_error(np.asarray(x), y) < tolerance


def losses(name: str, mask: np.ndarray | None = None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Σ sin(out) of the call, for arrays of JAX and of PyTorch."""
    method, options, _, _ = CALLS[name]

    def loss(sin: Callable[..., Any], as_array: Callable[[Any], Any]) -> Callable[..., Any]:
        given = options | {key: tuple(map(as_array, x)) for key, x in options.items() if key == "center" and x is MEANS}
        key_mask = None if mask is None else as_array(mask)
        return lambda q, k, v: sin(subquad.attention(q, k, v, method, key_mask=key_mask, **given)).sum()

    return loss(jax.numpy.sin, jax.numpy.asarray), loss(torch.sin, torch.tensor)


def arrays_of(name: str) -> list[np.ndarray]:
    _, _, rows, keys = CALLS[name]
    return draw(rows, keys, (*keys[:-1], 6))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_gradient(name: str, masked: bool) -> None:
    q, k, v = arrays_of(name)
    mask = np.random.default_rng(1).random(k.shape[-2]) < 0.7 if masked else None
    loss, of = losses(name, mask)
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    same(gradient(q, k, v), of_torch(of, q, k, v))
    if not masked:
        text = gradient.lower(q, k, v).as_text()
        assert all(kernel in text for kernel in COMPILED.get(name, ()))


@pytest.mark.parametrize("name", ["favor", "causal", "few keys"])
def test_vmap_runs_a_kernel_once(name: str) -> None:
    """Also where the items share an array: each has a gradient of its own by it."""
    q, k, v = arrays_of(name)
    loss, of = losses(name)
    each = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, 0)))
    same(each(q, k[0], v), map(np.stack, zip(*(of_torch(of, q[i], k[0], v[i]) for i in range(2)), strict=True)))
    if name != "causal":  # whose program has the generic form for rows beyond the range of the kernel
        assert "while" not in each.lower(q, k[0], v).as_text()
    whole = jax.grad(lambda q, k, v: jax.vmap(loss, (0, None, 0))(q, k, v).sum(), (0, 1, 2))
    same(whole(q, k[0], v), of_torch(lambda q, k, v: of(q[0], k, v[0]) + of(q[1], k, v[1]), q, k[0], v))


@pytest.mark.parametrize("name", ["favor", "causal linear", "few queries"])
def test_scan_checkpoint_and_second_derivatives(name: str) -> None:
    q, k, v = arrays_of(name)
    loss, of = losses(name)

    def layers(q: Any, k: Any, v: Any) -> Any:
        return jax.lax.scan(lambda sum_, x: (sum_ + jax.checkpoint(loss)(*x), None), 0.0, (q, k, v))[0]

    if k.shape[0] == len(q):
        same(jax.jit(jax.grad(layers, (0, 1, 2)))(q, k, v), of_torch(of, q, k, v))

    def of_gradient(q: Any, k: Any, v: Any) -> Any:
        return (torch.autograd.grad(of(q, k, v), k, create_graph=True)[0] ** 2).sum()

    twice = jax.jit(jax.grad(lambda *x: (jax.grad(loss, 1)(*x) ** 2).sum(), (0, 1, 2)))(q, k, v)
    same(twice, of_torch(of_gradient, q, k, v), 1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_gradient_by_directions_and_scale(causal: bool) -> None:
    q, k, v, omega = draw((2, 20, 4), (2, 20, 4), (2, 20, 3), (6, 4))

    def loss(sin: Any) -> Any:
        return lambda q, omega, factor: sin(
            subquad.attention(q * factor, as_(q, k), as_(q, v), subquad.Favor(omega=omega), causal=causal)
        ).sum()

    def as_(like: Any, x: np.ndarray) -> Any:
        return torch.tensor(x) if isinstance(like, torch.Tensor) else jax.numpy.asarray(x)

    factor = np.float64(0.7)
    same(
        jax.jit(jax.grad(loss(jax.numpy.sin), (0, 1, 2)))(q, omega, factor), of_torch(loss(torch.sin), q, omega, factor)
    )


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("method", ["favor", "linear"])
def test_gradient_through_states(method: str, heads: int) -> None:
    """Chunks that read and leave states: the gradient by a state goes back through the step that made it."""
    q, k, v, late = draw((2, 90, 4), (heads, 90, 4), (heads, 90, 3), (2, 30, 4))
    made = subquad.Favor(num_features=6) if method == "favor" else subquad.Linear()

    def in_chunks(sin: Any) -> Any:
        def loss(q: Any, k: Any, v: Any, late: Any) -> Any:
            out, state = made.step(q[:, :40], k[:, :40], v[:, :40])
            more, state = made.step(q[:, 40:], k[:, 40:], v[:, 40:], state)
            return sin(out).sum() + sin(more).sum() + sin(made.attend(late, state)).sum()

        return loss

    def whole(q: Any, k: Any, v: Any, late: Any) -> Any:
        return sum(torch.sin(x).sum() for x in (made(q, k, v, causal=True), made(late, k, v)))

    expected = of_torch(whole, q, k, v, late)
    same(jax.jit(jax.grad(in_chunks(jax.numpy.sin), (0, 1, 2, 3)))(q, k, v, late), expected)
    same(of_torch(in_chunks(torch.sin), q, k, v, late), expected)


def test_gradient_of_rows_beyond_the_range_of_the_kernel_is_generic() -> None:
    q, k, v = (x.astype(np.float32) for x in draw((2, 80, 8), (2, 80, 8), (2, 80, 8)))
    k[1, 0] *= 60  # the reference of a first block: features of later keys underflow
    method = subquad.Favor(num_features=24)
    found = [
        jax.jit(jax.grad(lambda *x: jax.numpy.sin(subquad.attention(*x, method, causal=True)).sum(), (0, 1, 2)))(*given)
        for given in ((q, k, v), (x.astype(np.float64) for x in (q, k, v)))
    ]
    same(*found, 1e-4)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, subquad
from jax.sharding import Mesh, PartitionSpec as P
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((2, 4, 140, 8)), "float32") for _ in range(3))
mesh, batch, everywhere = Mesh(np.array(jax.devices()), "x"), P("x"), P()
for method, causal in (("favor", False), ("favor", True), ("linear", True)):
    attend = lambda q, k, v: subquad.attention(q, k, v, method, causal=causal)
    for given, parts in (((q, k, v), (batch, batch, batch)), ((q, k[:1], v), (batch, everywhere, batch))):
        shards = jax.shard_map(attend, mesh=mesh, in_specs=parts, out_specs=batch)
        found = [jax.jit(jax.grad(lambda given: (f(*given) ** 2).sum()))(given) for f in (shards, attend)]
        for got, expected in zip(*found):
            assert np.max(np.abs(got - expected)) < 2e-5 * np.max(np.abs(expected)), (method, causal)
print("done")
"""


def test_shards_of_attention() -> None:
    if not hasattr(jax, "shard_map"):
        pytest.skip("this JAX has it elsewhere")
    assert python(SHARDED, **TWO_DEVICES) == "done"


def test_loops_over_shards_have_carries_of_one_type() -> None:
    """Sums alone, and sums beside rows, of arrays that differ between shards; a mesh of one device has the types too."""
    if not hasattr(jax, "shard_map"):
        pytest.skip("this JAX has it elsewhere")
    from jax.sharding import Mesh, PartitionSpec

    def sums(x: Any, *, rows: bool) -> Any:
        def step(total: Any, block: Any) -> Any:
            total = total + block.sum(axis=-2)
            return total, total[None] + block if rows else None

        total, out = backend_of(jax.numpy).fold_blocks(step, jax.numpy.zeros(3), [x], 4)
        return out if rows else total

    x = jax.numpy.arange(30.0).reshape(10, 3)
    parts = PartitionSpec("x")
    for rows in (False, True):
        run = functools.partial(sums, rows=rows)
        shards = jax.shard_map(run, mesh=Mesh(np.array(jax.devices()[:1]), "x"), in_specs=parts, out_specs=parts)
        assert np.array_equal(jax.jit(shards)(x), run(x))


@pytest.mark.parametrize(("y", "total", "is_right"), [(2, 6, True), (2, 5, False), (1, 6, False)])
def test_the_self_check_wants_every_result_right(
    y: int, total: int, is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, and sums over rows."""
    from subquad_jax import ffi

    def called(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        x = np.asarray(given["x"])
        return {"y": y * x, "total": total * x.sum(axis=0)}

    monkeypatch.setattr(ffi, "call", called)
    assert ffi.round_trip_is_right() is is_right
