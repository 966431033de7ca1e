"""Gradients equal finite differences, in double precision, for every method and the scan."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Torch, relative_error
from rows.methods import METHODS, Case, D, Row, named, rows
from rows.scans import Scan, scans

import subquad

# small: finite differences cost one call per number
N = 5
CASE = Case((1, 2, N, D), (1, 1, N, D), (1, 1, N, 2))
MASK = np.array([True, False, True, True, True])


def small_options(row: Row) -> dict[str, Any]:
    """Fewer landmarks, near keys and rows of blocks than there are, or the method would be exact; fewer features, or it
    takes long."""
    options = dict(row.options)
    if "num_landmarks" in options:
        options["num_landmarks"] = 3
    if "num_features" in options:
        options["num_features"] = min(options["num_features"], 8)
    if row.method == "clustered" and options:
        options |= {"cluster_size": 2, "chunk": 2, "sinks": 1, "window": 0, "opened": min(options["opened"], 1)}
    sizes = {"rank": 3, "left": 1, "bucket_size": 2, "rest_size": 2}
    sizes |= {} if row.name == "bigbird-plan" else {"block_size": 2}
    return {name: min(x, sizes[name]) if name in sizes else x for name, x in options.items()}


# relu has no derivative at 0, where finite differences and gradients disagree by right: its data stay away from it;
# finite differences move the statistics of "derf", which count as constants: those that are given stay
DERF = ("favor-derf", "favor-derf-scale")
SMOOTH = [row for row in METHODS if row.name not in ("favor", "nystrom-default", "nystrom-query-mask", *DERF)]


@rows(SMOOTH)
def test_torch_gradcheck(row: Row) -> None:
    torch = pytest.importorskip("torch")
    library = Torch()
    small = dataclasses.replace(row, options=small_options(row))
    inputs = [library.array(x / 2, "float64").requires_grad_() for x in list(CASE.draw().values())[:3]]
    arrays = library.arrays(row.arrays(CASE), "float64")
    mask = torch.from_numpy(MASK)
    names = [name for name in arrays if not isinstance(arrays[name], tuple)]
    for causal in row.forms:

        def attend(q: Any, k: Any, v: Any, *given: Any, causal: bool = causal) -> Any:
            mine = {**arrays, **dict(zip(names, given, strict=True))}
            return small.call(causal=causal)(q, k, v, None if causal else mask, mine)

        given = [arrays[name].requires_grad_(arrays[name].is_floating_point()) for name in names]
        assert torch.autograd.gradcheck(attend, (*inputs, *given), fast_mode=True)


@pytest.mark.parametrize("form", ["plain", "causal", "mask", "causal-mask", "negative-scale"])
def test_torch_differentiates_exact_attention_twice(form: str) -> None:
    """PyTorch's fused attention, which wants d_v = d, knows first derivatives only. q, k, v depend on one another."""
    torch = pytest.importorskip("torch")
    n = 17
    mask = torch.arange(n) % 4 > 0 if form in ("mask", "causal-mask") else None
    options = {"causal": "causal" in form, "key_mask": mask, "scale": -0.7 if form == "negative-scale" else None}
    drawn = Case((1, 2, n, D), (1, 1, n, D), (1, 1, n, D)).draw()
    q, k, v = (torch.from_numpy(drawn[name] / 2).requires_grad_() for name in ("q", "k", "v"))

    def attend(q: Any, k: Any, v: Any) -> Any:
        return subquad.attention(q, k * q[:, :1], v + k, "exact", implementation="sdpa", **options)

    assert torch.autograd.gradgradcheck(attend, (q, k, v), fast_mode=True)
    loss = attend(q, k, v).square().sum()
    plain, further = (torch.autograd.grad(loss, (q, k, v), retain_graph=True, create_graph=x) for x in (False, True))
    for one, other in zip(plain, further, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@rows(named("exact", "exact-generic", "favor-seed", "favor-relu", "linear", "linformer", "linformer-random", "nystrom", "nystrom-ridge",
             "nystrom-ridge-fit"))  # fmt: skip
def test_jax_check_grads(jax_library: Jax, row: Row) -> None:
    """Reverse mode against finite differences along a random direction."""
    from jax.test_util import check_grads

    small = Row(row.name, row.method, small_options(row), causal=row.causal)
    with jax_library.context("float64"):
        import jax

        inputs = [jax_library.array(x / 2, "float64") for x in list(CASE.draw().values())[:3]]
        mask = jax_library.array(MASK, "float64")
        attend = jax.jit(lambda q, k, v: small.call(causal=row.causal)(q, k, v, mask, {}))
        check_grads(attend, tuple(inputs), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@scans()
def test_scan_torch_gradcheck(scan: Scan) -> None:
    """Of every input, the initial state included, through the output and the last state."""
    check_scan(scan, "generic")


@scans("gated", "groups", "complex")
def test_scan_torch_gradcheck_of_the_override(scan: Scan) -> None:
    """What "auto" takes; compiling every form of it would take minutes, and its own tests do."""
    check_scan(scan, "auto")


def check_scan(scan: Scan, implementation: str) -> None:
    torch = pytest.importorskip("torch")
    drawn = scan.draw(4)
    names = list(drawn)
    tensors = [torch.from_numpy(drawn[name].copy()).requires_grad_() for name in names]

    def call(*given: Any) -> Any:
        return scan.call(implementation=implementation)(dict(zip(names, given, strict=True)))

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    for i, out in enumerate(call(*tensors)):
        reached = torch.autograd.grad(out.abs().sum(), tensors, allow_unused=True, retain_graph=True)
        for name, gradient in zip(names, reached, strict=True):
            # the state knows nothing of what only the output reads
            silent = i == 1 and name in ("C", "D", "z")
            assert silent or (gradient is not None and bool((gradient != 0).any())), f"{name} has no gradient"


def tied(P: Any, other: Any) -> tuple[Any, Any, Any]:
    """(A, B, C) where B and C are one parameter."""
    return -other, P, P


def normalised(P: Any, other: Any) -> tuple[Any, Any, Any]:
    """A, B, C where B = √(1 − exp(2A)) keeps the variance of the state, as in a linear recurrent unit."""
    A = -P.exp()
    return A, (1 - (2 * A).exp()).sqrt(), other


@pytest.mark.parametrize("maps", [tied, normalised])
def test_scan_counts_what_its_inputs_share_once(maps: Any) -> None:
    """Inputs that are or were computed from one another, in a gradient to go on with."""
    torch = pytest.importorskip("torch")
    u, delta = torch.rand(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other, P = torch.rand(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    P.requires_grad_()

    def call(P: Any) -> Any:
        return subquad.selective_scan(u, delta, *maps(P, other))

    assert torch.autograd.gradgradcheck(call, P)
    loss = call(P).square().sum()
    plain, further = (torch.autograd.grad(loss, P, retain_graph=True, create_graph=more)[0] for more in (False, True))
    torch.testing.assert_close(further, plain, rtol=1e-12, atol=1e-12)


@scans("gated", "groups", "reverse")
def test_scan_jax_check_grads(jax_library: Jax, scan: Scan) -> None:
    from jax.test_util import check_grads

    with jax_library.context("float64"):
        import jax

        drawn = {name: jax_library.array(x, "float64") for name, x in scan.draw(4).items()}
        check_grads(jax.jit(scan.call()), (drawn,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@scans("gated", "complex-groups", "reverse")
def test_scan_jax_differentiates_twice(jax_library: Jax, scan: Scan) -> None:
    """Through the kernel's own gradient, and through both outputs."""
    import jax

    def again(implementation: str) -> Any:
        def loss(given: dict[str, Any]) -> Any:
            y, state = scan.call(implementation=implementation)(given)
            return (y**2).sum() + (abs(state) ** 2).sum()

        def steepness(given: dict[str, Any]) -> Any:
            return sum((abs(x) ** 2).sum() for x in jax.grad(loss)(given).values())

        return jax.jit(jax.grad(steepness))

    with jax_library.context("float64"):
        drawn = {name: jax_library.array(x, "float64") for name, x in scan.draw(9).items()}
        expected = again("generic")(drawn)
        for name, got in again("auto")(drawn).items():
            assert relative_error(np.asarray(got), np.asarray(expected[name])) <= 1e-11, name


@scans("complex", "complex-groups", "reverse-complex")
def test_scan_gradient_is_the_same_on_jax_and_torch(jax_library: Jax, scan: Scan) -> None:
    """Complex inputs, where conventions differ by a conjugate."""
    torch = pytest.importorskip("torch")
    drawn = scan.draw(9)
    tensors = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in drawn.items()}
    scan.call(return_state=False)(tensors).square().sum().backward()
    with jax_library.context("float64"):
        import jax

        loss = jax.jit(jax.grad(lambda given: (scan.call(return_state=False)(given) ** 2).sum()))
        gradients = loss({name: jax_library.array(x, "float64") for name, x in drawn.items()})
        for name, tensor in tensors.items():
            ours, theirs = np.conj(np.asarray(gradients[name])), tensor.grad.resolve_conj().numpy()
            assert np.max(np.abs(ours - theirs)) <= 1e-12 * np.max(np.abs(theirs)), name


def test_gradient_through_chunks_is_the_gradient_of_the_whole() -> None:
    """Through the state from chunk to chunk, for the scan and for streaming attention."""
    torch = pytest.importorskip("torch")
    scan = Scan("gated", extras=("D", "z", "delta_bias"), softplus=True)
    from test_scan import cut

    drawn = scan.draw(20)
    results = []
    for edges in ((0, 20), (0, 7, 14, 20)):
        tensors = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in drawn.items()}
        state, outs = None, []
        for a, b in itertools.pairwise(edges):
            y, state = scan.call()(cut(tensors, a, b, state))
            outs.append(y)
        (torch.cat(outs, -2).square().sum() + state.sum()).backward()
        results.append([x.grad.numpy() for x in tensors.values()])
    for whole, parts in zip(*results, strict=True):
        assert np.max(np.abs(whole - parts)) <= 1e-12 * np.max(np.abs(whole))


@rows(named("favor-seed", "favor-hyperbolic", "linear"))
def test_gradient_through_steps_is_the_gradient_of_the_causal_form(row: Row) -> None:
    torch = pytest.importorskip("torch")
    method = row.object()
    results = []
    for size in (20, 6):
        q, k, v = (
            torch.from_numpy(x.copy()).requires_grad_()
            for x in list(Case((20, D), (20, D), (20, 3)).draw().values())[:3]
        )
        state, outs = None, []
        for i in range(0, 20, size):
            out, state = method.step(q[i : i + size], k[i : i + size], v[i : i + size], state)
            outs.append(out)
        torch.cat(outs).square().sum().backward()
        results.append([x.grad.numpy() for x in (q, k, v)])
    for whole, parts in zip(*results, strict=True):
        assert np.max(np.abs(whole - parts)) <= 1e-11 * np.max(np.abs(whole))


@pytest.mark.parametrize("causal", [False, True])
@rows(named("favor-seed", "linear"))
def test_gradient_of_the_first_row(row: Row, causal: bool) -> None:
    """Row 0 of the causal form reads key 0 alone: out[0] = v[0], so ∂out[0]/∂v[0] = 1 and nothing else moves it."""
    torch = pytest.importorskip("torch")
    q, k, v = (
        torch.from_numpy(x.copy()).requires_grad_() for x in list(Case((6, D), (6, D), (6, 1)).draw().values())[:3]
    )
    row.call(causal=causal)(q, k, v, None, {})[0].sum().backward()
    if causal:
        assert torch.allclose(v.grad[:, 0], torch.eye(6, dtype=torch.float64)[0], atol=1e-14)
        assert float(k.grad.abs().max()) < 1e-14
        assert float(q.grad.abs().max()) < 1e-14
    else:
        assert bool((v.grad[:, 0] > 0).all())
        assert float(k.grad[1:].abs().min()) > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1e-20, 1e-24])
def test_gradients_of_tiny_relu_features(size: float, causal: bool) -> None:
    """Products of two rows of this size, or their inverse, are beyond float32, and the gradient is not."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q, k, v, by = (torch.from_numpy(rng.standard_normal((40, D)) * x) for x in (size, size, 1, 1))
    found = []
    for dtype in (torch.float64, torch.float32):
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = subquad.attention(*given, subquad.Favor(num_features=32, features="relu"), causal=causal)
        found.append(torch.autograd.grad(out, given, by.to(dtype)))
    for exact, single in zip(*found, strict=True):
        assert relative_error(single.double().numpy(), exact.numpy()) < 1e-5
