"""Public functions go through torch.compile, torch.func and the transforms of JAX, and give the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from interpreter import TWO_DEVICES, python
from rows.libraries import Jax, relative_error, tolerance
from rows.methods import MAIN, Case, D, Row, named, rows
from rows.scans import Scan, scans

import subquad

N = 70
CASE = Case((2, N, D), (2, N, D), (2, N, 3), mask="right")
ROUTES = named("exact", "exact-generic", "favor-seed", "favor-trigonometric", "linear", "linformer", "linformer-random",
               "nystrom", "nystrom-uniform", "nystrom-kmeans", "nystrom-ridge-fit", "clustered")  # fmt: skip
SOME = named("exact", "favor-seed", "linear", "linformer", "linformer-random", "nystrom", "nystrom-ridge-fit")


@pytest.fixture
def torch() -> Iterator[Any]:
    """The module torch, with its compiler reset before and after the test."""
    module = pytest.importorskip("torch")
    module._dynamo.reset()
    yield module
    module._dynamo.reset()


def inputs(torch: Any) -> list[Any]:
    drawn = CASE.draw()
    return [torch.from_numpy(drawn[name]) for name in ("q", "k", "v", "key_mask")]


@rows(ROUTES)
def test_torch_compile_full_graph(torch: Any, row: Row) -> None:
    """No graph break, forward and backward; warm: after an eager call, and again with other values."""
    q, k, v, mask = inputs(torch)
    function = row.call(causal=row.causal)
    expected = function(q, k, v, mask, {})
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(q, k, v, mask, {}).numpy(), expected.numpy()) < tolerance("float64")
    q.requires_grad_()
    compiled(q, k, v, mask, {}).square().sum().backward()
    got, q.grad = q.grad, None
    function(q, k, v, mask, {}).square().sum().backward()
    assert relative_error(got.numpy(), q.grad.numpy()) < 1e-11


@scans("gated", "groups")
def test_torch_compile_scan(torch: Any, scan: Scan) -> None:
    drawn = {name: torch.from_numpy(x) for name, x in scan.draw(40).items()}
    compiled = torch.compile(scan.call(), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(drawn), scan.call()(drawn), strict=True):
        assert relative_error(got.numpy(), expected.numpy()) < tolerance("float64")


@rows(named("exact", "exact-generic", "favor-seed", "favor-relu", "linear", "linear-function", "nystrom"))
@pytest.mark.parametrize("compiled", [False, True])
def test_torch_autocast_leaves_the_precision(torch: Any, row: Row, compiled: bool) -> None:
    """With a gradient recorded, where causal features are generic: none of its products is rounded to bfloat16."""
    given = [x.float().requires_grad_() for x in inputs(torch)[:3]]
    function = row.call(causal=row.causal)
    want = function(*given, None, {})
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(*given, None, {})
    assert relative_error(got.detach().numpy(), want.detach().numpy()) < tolerance("float32")


@rows(named("favor-seed", "linear", "nystrom"))
def test_torch_autocast_leaves_the_precision_of_states(torch: Any, row: Row) -> None:
    q, k, v = (x.float() for x in inputs(torch)[:3])
    method = row.object() if row.causal else subquad.Nystrom(landmarks=(q[:, :9], k[:, :9]))

    def stream() -> list[Any]:
        state = method.merge(method.summarize(k[:, :30], v[:, :30]), method.summarize(k[:, 30:], v[:, 30:]))
        outs = [method.attend(q, state), *state.values()]
        return [*outs, method.step(q, k, v, state)[0]] if row.causal else outs

    want = stream()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = stream()
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_torch_autocast_leaves_the_precision_of_landmarks(torch: Any) -> None:
    q, k, v = torch.randn(3, 1, 40, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) < 35
    method = subquad.Nystrom(num_landmarks=8)
    want = method.with_landmarks(q, k, key_mask=mask)(q, k, v, key_mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = method.with_landmarks(q, k, key_mask=mask)(q, k, v, key_mask=mask)
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore")
def test_torch_script_decides_nothing_by_the_values_it_saw(torch: Any) -> None:
    """Keys unlike the first, which causal features treat on their own, may come later."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 80, 16, generator=generator)
    omega = torch.randn(32, 16, generator=generator)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return subquad.attention(q, k, v, "favor", omega=omega, causal=True)

    traced = torch.jit.trace(attend, (q, k, v), check_trace=False)
    k = torch.cat([12 * k[:1], k[1:]])
    assert relative_error(traced(q, k, v).numpy(), attend(q, k, v).numpy()) < tolerance("float32")


def test_torch_compile_step_and_state(torch: Any) -> None:
    method = subquad.Favor(num_features=8)

    def decode(q: Any, k: Any, v: Any) -> Any:
        _, state = method.step(q[:, :20], k[:, :20], v[:, :20])
        out, _ = method.step(q[:, 20:], k[:, 20:], v[:, 20:], state)
        return out

    q, k, v, _ = inputs(torch)
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(q, k, v).numpy(), decode(q, k, v).numpy()) < tolerance("float64")


COLD = """
import torch, subquad
q, k, v = torch.randn(3, 1, 20, 8, dtype=torch.float64)
cases = [("exact", {}), ("favor", {"num_features": 8, "causal": True}), ("nystrom", {"num_landmarks": 4})]
for method, options in cases:
    call = lambda q, k, v: subquad.attention(q, k, v, method, **options)
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.allclose(out, call(q, k, v), rtol=1e-11, atol=1e-11), method
"""


def test_torch_compile_cold() -> None:
    """The first call of the process is compiled: the backend loads and ω is drawn inside."""
    pytest.importorskip("torch")
    python(COLD)


@rows(MAIN)
def test_torch_vmap(torch: Any, row: Row) -> None:
    q, k, v, mask = inputs(torch)
    function = row.call(causal=row.causal)
    expected = function(q, k, v, mask, {})
    mapped = torch.func.vmap(lambda q, k, v, mask: function(q, k, v, mask, {}))(q, k, v, mask)
    assert relative_error(mapped.numpy(), expected.numpy()) < tolerance("float64")


@rows(ROUTES)
def test_torch_func_grad(torch: Any, row: Row) -> None:
    q, k, v, mask = inputs(torch)
    function = row.call(causal=row.causal)
    gradient = torch.func.grad(lambda q: function(q, k, v, mask, {}).square().sum())(q)
    q.requires_grad_()
    function(q, k, v, mask, {}).square().sum().backward()
    assert relative_error(gradient.numpy(), q.grad.numpy()) < 1e-12


@scans("gated", "state")
def test_torch_func_of_the_scan(torch: Any, scan: Scan) -> None:
    drawn = {name: torch.from_numpy(x) for name, x in scan.draw(20).items()}
    axes = {name: 0 if x.ndim == drawn["u"].ndim else None for name, x in drawn.items()}
    axes["A"] = None
    mapped = torch.func.vmap(scan.call(), in_dims=(axes,))(drawn)
    for got, expected in zip(mapped, scan.call()(drawn), strict=True):
        assert relative_error(got.numpy(), expected.numpy()) < tolerance("float64")
    gradient = torch.func.grad(lambda given: scan.call(return_state=False)(given).square().sum())(drawn)
    leaf = drawn["u"].requires_grad_()
    scan.call(return_state=False)(drawn).square().sum().backward()
    assert relative_error(gradient["u"].detach().numpy(), leaf.grad.numpy()) < 1e-12


def test_torch_forward_mode_of_the_scan(torch: Any) -> None:
    """y is linear in u: its tangent along u is y."""
    forward_ad = torch.autograd.forward_ad
    scan = Scan("plain")
    given = {name: torch.from_numpy(x) for name, x in scan.draw(20).items()}
    with forward_ad.dual_level():
        y = scan.call(return_state=False)({**given, "u": forward_ad.make_dual(given["u"], given["u"].clone())})
        value, tangent = forward_ad.unpack_dual(y)
        assert tangent is not None
        assert relative_error(tangent.numpy(), value.numpy()) < tolerance("float64")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("causal", [False, True])
def test_torch_exports_exact_attention_of_any_length(torch: Any, causal: bool) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return subquad.attention(x, x, x, "exact", causal=causal)

    n = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(Layer(), (torch.rand(1, 20, 8),), dynamic_shapes=({1: n},)).module()
    for length in (3, 40):
        x = torch.rand(1, length, 8)
        assert torch.allclose(program(x), Layer()(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_torch_higher_derivatives_of_exact_attention(torch: Any, causal: bool, compiled: bool) -> None:
    """Forward mode and functional second derivatives, which PyTorch's own attention lacks, are the generic form's."""
    generator = torch.Generator().manual_seed(0)
    x, along = (torch.rand(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    forward_ad, func = torch.autograd.forward_ad, torch.func

    def loss(x: Any, implementation: str) -> Any:
        out = subquad.attention(x, x * x, x, "exact", causal=causal, implementation=implementation)
        return out.square().sum()

    def dual(x: Any, implementation: str) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, along), implementation)).tangent

    def jvp(x: Any, implementation: str) -> Any:
        return func.jvp(lambda x: loss(x, implementation), (x,), (along,))[1]

    def hessian(x: Any, implementation: str) -> Any:
        return func.hessian(lambda x: loss(x, implementation))(x)

    def again(x: Any, implementation: str) -> Any:
        return func.grad(lambda x: (func.grad(lambda x: loss(x, implementation))(x) * along).sum())(x)

    for call in (dual, jvp, hessian, again):
        want = call(x, "generic")
        got = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(x, "auto")
        assert relative_error(got.numpy(), want.numpy()) < tolerance("float64")


@pytest.mark.parametrize("order", ["one", "batch"])
def test_torch_functional_first_derivatives_keep_the_fused_attention(torch: Any, order: str) -> None:
    """It knows those, and holds no n × n matrix."""
    q = torch.rand(2, 70, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(q: Any) -> Any:
        return subquad.attention(q, q, q, "exact", implementation="sdpa").square().sum()

    got = torch.func.grad(loss)(q) if order == "one" else torch.func.vmap(torch.func.grad(loss))(q)
    want = torch.autograd.grad(loss(q.requires_grad_()), q)[0]
    assert relative_error(got.numpy(), want.numpy()) < tolerance("float64")


def scans_of(torch: Any) -> dict[str, Any]:
    """Scans as functions of one tensor (5, 3), the other inputs fixed."""
    generator = torch.Generator().manual_seed(0)
    a, x = (torch.rand(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    A = -torch.rand(3, 2, dtype=torch.float64, generator=generator)
    return {
        "linear": lambda b: subquad.linear_scan(a, b),
        "gated": lambda q: subquad.gated_linear_attention(q, a, x * q, -a, bonus=x[0]),
        "selective": lambda u: subquad.selective_scan(u, a, A, x[:, :2], a[:, :2], x[0], z=x),
    }


@pytest.mark.parametrize("name", ["linear", "selective", "gated"])
def test_torch_batches_of_gradients_of_a_scan(torch: Any, name: str) -> None:
    """A vectorised Jacobian by each of PyTorch's ways is the one row by row; so are tangents of its rows."""
    from torch.autograd.functional import jacobian

    forward_ad = torch.autograd.forward_ad
    function = scans_of(torch)[name]
    x = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    want = jacobian(function, x)
    y, rows = function(x), torch.eye(15, dtype=torch.float64).reshape(15, 5, 3)

    def pull(row: Any, **more: Any) -> Any:
        return torch.autograd.grad(y, x, row, retain_graph=True, **more)[0]

    batched, mapped = pull(rows, is_grads_batched=True), torch.func.vmap(pull)(rows)
    with forward_ad.dual_level():
        duals = [pull(forward_ad.make_dual(row, row)) for row in rows]
        tangents = torch.stack([forward_ad.unpack_dual(x).tangent for x in duals])
    for got in (jacobian(function, x, vectorize=True), batched, mapped, tangents):
        assert relative_error(got.reshape(want.shape).numpy(), want.numpy()) < tolerance("float64")


@pytest.mark.parametrize("name", ["linear", "selective", "gated"])
def test_torch_compile_differentiates_forward_through_a_scan(torch: Any, name: str) -> None:
    """Transforms and tangents inside of a compiled function, where the operator would lose the tangent."""
    forward_ad = torch.autograd.forward_ad
    function = scans_of(torch)[name]
    generator = torch.Generator().manual_seed(1)
    x, along = (torch.rand(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))

    def dual(x: Any) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, along))).tangent

    def jvp(x: Any) -> Any:
        return torch.func.jvp(function, (x,), (along,))[1]

    def hessian(x: Any) -> Any:
        return torch.func.hessian(lambda x: function(x * x).square().sum())(x)

    for call in (dual, jvp, hessian):
        want = call(x)
        assert bool((want != 0).any())
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        assert relative_error(got.numpy(), want.numpy()) < tolerance("float64")


@rows(SOME)
def test_jax_transforms(jax_library: Jax, row: Row) -> None:
    """vmap of jit equals the batch; vmap(grad) equals the gradient of the batch."""
    import jax

    drawn = CASE.draw()
    function = row.call(causal=row.causal)
    with jax_library.context("float64"):
        q, k, v, mask = (jax_library.array(drawn[name], "float64") for name in ("q", "k", "v", "key_mask"))
        expected = jax.jit(lambda q, k, v, mask: function(q, k, v, mask, {}))
        mapped = jax.vmap(expected)(q, k, v, mask)
        assert relative_error(np.asarray(mapped), np.asarray(expected(q, k, v, mask))) < tolerance("float64")
        loss = jax.grad(lambda q, k, v, mask: (function(q, k, v, mask, {}) ** 2).sum())
        one, all_ = jax.jit(jax.vmap(loss))(q, k, v, mask), jax.jit(loss)(q, k, v, mask)
        assert relative_error(np.asarray(one), np.asarray(all_)) < 1e-11


@scans("gated")
def test_jax_transforms_of_the_scan(jax_library: Jax, scan: Scan) -> None:
    import jax

    with jax_library.context("float64"):
        drawn = {name: jax_library.array(x, "float64") for name, x in scan.draw(20).items()}
        axes = {name: 0 if x.ndim == 3 else None for name, x in drawn.items()}
        mapped = jax.jit(jax.vmap(scan.call(), in_axes=(axes,)))(drawn)
        for got, expected in zip(mapped, scan.call()(drawn), strict=True):
            assert relative_error(np.asarray(got), np.asarray(expected)) < tolerance("float64")


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, subquad
from jax.sharding import Mesh, PartitionSpec as P
subquad.core.block_loop.BLOCK_ELEMENTS = 1
rng = np.random.default_rng(0)
x, delta, B = (jnp.asarray(rng.uniform(0.1, 1, (2, 140, d)), "float32") for d in (6, 6, 3))
A, batch, rows, everywhere = -jnp.ones((6, 3)), P("x"), P(None, "x"), P()
for choice in ("auto", "generic"):
    scan = lambda u, delta, A, B: subquad.selective_scan(u, delta, A, B, B, implementation=choice)
    linear = lambda a, b: subquad.linear_scan(a, b, implementation=choice)
    exact = lambda q, k: subquad.attention(q, k, k, "exact", implementation=choice)
    for function, given, parts, out in (
        (scan, (x, delta, A, B), (batch, batch, everywhere, batch), batch),
        (linear, (delta, x), (batch, batch), batch),
        (exact, (x, delta), (rows, everywhere), rows),
    ):
        shards = jax.shard_map(function, mesh=Mesh(np.array(jax.devices()), "x"), in_specs=parts, out_specs=out)
        def gradients(f):
            return jax.jit(jax.grad(lambda given: (f(*given) ** 2).sum()))(given)
        for got, expected in zip(gradients(shards), gradients(function)):
            error = np.max(np.abs(np.asarray(got) - np.asarray(expected))) / np.max(np.abs(np.asarray(expected)))
            assert error < 2e-5, (choice, given, error)
"""

DIVIDED = """
import jax, jax.numpy as jnp, numpy as np, subquad
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
x, A = jnp.linspace(0.1, 1, 2 * 9 * 3).reshape(2, 9, 3), -jnp.ones((3, 3))
two, one = (Mesh(np.array(jax.devices()[:count]), "x") for count in (2, 1))
expected = np.asarray(subquad.selective_scan(x, x, A, x, x))

def put(mesh, part, *arrays):
    return [jax.device_put(array, NamedSharding(mesh, part)) for array in arrays]

for mesh in (two, one):
    (u,), (weights,) = put(mesh, P("x"), x), put(mesh, P(), A)
    got = subquad.selective_scan(u, u, weights, u, u)
    assert np.max(np.abs(np.asarray(got) - expected)) < 1e-5
subquad.selective_scan(u, u, A, u, u)  # u on a mesh of the one device of A
try:
    subquad.selective_scan(*put(two, P("x"), x, x), A, x, x)
except ValueError as error:
    assert "u is on device {CpuDevice(id=" in str(error) and "A is on cpu:0" in str(error), error
else:
    raise AssertionError("A is on one device, u on two")
"""


def test_jax_shard_map(jax_library: Jax) -> None:
    """Gradients too, those of inputs that all shards share; a loop's carry begins with the type that it will have."""
    import jax

    if not hasattr(jax, "shard_map"):
        pytest.skip("this JAX has it elsewhere")
    python(SHARDED, **TWO_DEVICES)


def test_jax_arrays_divided_among_devices(jax_library: Jax) -> None:
    """A batch in shards and weights that every device has are on the same devices."""
    python(DIVIDED, **TWO_DEVICES)


@pytest.mark.parametrize("transform", ["eager", "jit", "vmap", "jit(vmap)", "vmap(grad)", "scan", "checkpoint"])
def test_jax_self_check_is_outside_of_the_trace(jax_library: Jax, transform: str) -> None:
    """The first call of a process may be anywhere: a check that met a tracer would turn the kernels off for good."""
    import jax

    from subquad_jax import conditions, ffi

    pytest.importorskip("llvmlite")
    said = []

    def counts() -> bool:  # a new function: nothing is known of it
        return ffi.round_trip_is_right()

    def ask(x: Any) -> Any:
        said.append(conditions.self_check(counts))
        return x.sum()

    x = jax_library.array(np.ones((2, 3)), "float32")
    {
        "eager": ask,
        "jit": jax.jit(ask),
        "vmap": jax.vmap(ask),
        "jit(vmap)": jax.jit(jax.vmap(ask)),
        "vmap(grad)": jax.vmap(jax.grad(ask)),
        "scan": lambda x: jax.lax.scan(lambda total, row: (total + ask(row), None), 0.0, x),
        "checkpoint": jax.grad(jax.checkpoint(ask)),
    }[transform](x)
    assert set(said) == {None}


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([MemoryError("full"), True], ["its self-check failed: full", None]),
        ([False, True], ["its self-check gave wrong numbers"] * 2),
        ([RuntimeError("another version"), True], ["its self-check failed: another version"] * 2),
    ],
    ids=["passes", "wrong", "lasts"],
)
def test_jax_self_check_is_repeated_where_that_may_help(jax_library: Jax, answers: list[Any], said: list[Any]) -> None:
    from subquad_jax import conditions

    given = iter(answers)

    def answer() -> bool:
        if isinstance(found := next(given), Exception):
            raise found
        return found

    assert [conditions.self_check(answer) for _ in said] == said


def test_jax_eager_equals_jit(jax_library: Jax) -> None:
    """Eager calls take Python loops where traced ones take `lax.scan`."""
    import jax

    drawn = CASE.draw()
    q, k, v = (jax_library.array(drawn[name], "float32") for name in ("q", "k", "v"))
    for row in named("exact-generic", "favor-seed"):
        function = row.call(causal=True)
        eager, traced = function(q, k, v, None, {}), jax.jit(lambda q, f=function: f(q, k, v, None, {}))(q)
        assert relative_error(np.asarray(traced), np.asarray(eager)) < tolerance("float32")


def test_jax_methods_and_states_inside_jit(jax_library: Jax) -> None:
    """A state is a pytree: it goes in and out of compiled functions."""
    import jax

    drawn = CASE.draw()
    method = subquad.Favor(num_features=8)
    q, k, v = (jax_library.array(drawn[name], "float32") for name in ("q", "k", "v"))
    step = jax.jit(method.step)
    out, state = step(q[:, :35], k[:, :35], v[:, :35])
    out_later, state = step(q[:, 35:], k[:, 35:], v[:, 35:], state)
    full = jax.jit(lambda q, k, v: method(q, k, v, causal=True))(q, k, v)
    assert relative_error(np.concatenate([out, out_later], axis=1), np.asarray(full)) < tolerance("float32")
    assert jax.tree.structure(state).num_leaves == len(state)
