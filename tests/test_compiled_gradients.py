"""Gradients of the compiled attention against autograd of its definition in float64: edges, chunks, masks, centers."""

from __future__ import annotations

import io
import multiprocessing
import sys
from typing import Any

import numpy as np
import pytest
from interpreter import python
from weighted_means import log_weights, means

pytest.importorskip("llvmlite")

import compiled_calls
from compiled_calls import elu, exponential, gradients, softmax_gradients

import subquad
from subquad.kernels import iterative_pinv
from subquad_numpy.runtime.launch import to_shape
from subquad_numpy.table import COMPILED

torch = pytest.importorskip("torch")

# of the largest entry: a gradient is a chain of three sums, one with terms of both signs, where an output is one of two
TOLERANCE = {"float32": 1e-5, "float64": 3e-14}
# (heads, key heads, n, n_kv, d, d_v, m): below, at and beyond tiles, vectors, panels, blocks, chunks; shared keys
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 63, 130, 16, 7, 33),
    (3, 3, 257, 65, 64, 64, 64),
    (1, 1, 129, 4200, 20, 33, 48),
    (1, 1, 4500, 30, 12, 5, 20),
    (4, 1, 130, 515, 8, 16, 300),
    (2, 2, 5, 9, 65, 100, 17),
]


def draw(dtype: str, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(map(sum, shapes)))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def autograd(function: Any, arrays: list[np.ndarray], grad: np.ndarray) -> list[np.ndarray]:
    """Gradients of Σ grad · function(arrays), in float64."""
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]
    loss = (function(*tensors) * torch.tensor(grad, dtype=torch.float64)).sum()
    return [x.numpy() for x in torch.autograd.grad(loss, tensors)]


def product(
    scale: float, mask: np.ndarray | None, q: Any, k: Any, v: Any, keys: Any, queries: Any, *center: Any
) -> Any:
    q_mean, k_mean = center or (0.0, 0.0)
    k, q = k - k_mean, q - q_mean
    log_k = k @ keys - abs(scale) / 2 * (k * k).sum(-1, keepdim=True) + scale * (k * q_mean).sum(-1, keepdim=True)
    return means(log_weights(q @ queries, log_k), v, mask)


def softmax(scale: float, mask: np.ndarray | None, q: Any, k: Any, v: Any) -> Any:
    return means(scale * (q @ k.transpose(-1, -2)), v, mask)


def check(got: Any, expected: list[np.ndarray], dtype: str) -> None:
    largest = max(np.abs(want).max() for want in expected)  # some are 0 by right
    for x, want in zip(got, expected, strict=False):
        x = to_shape(np, x, want.shape)
        assert x.dtype == dtype
        assert np.abs(x - want).max() <= TOLERANCE[dtype] * max(np.abs(want).max(), largest / 100)


@pytest.mark.parametrize("form", ["plain", "centred", "directions of each head"])
@pytest.mark.parametrize("mask", ["none", "some", "a head sees nothing"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
def test_gradient_of_feature_product(size: tuple[int, ...], dtype: str, mask: str, form: str) -> None:
    heads, shared, n, n_kv, d, d_v, m = size
    of_keys = (heads, d, m) if form == "directions of each head" else (d, m)
    q, k, v, keys, grad, *center = draw(
        dtype, (heads, n, d), (shared, n_kv, d), (shared, n_kv, d_v), of_keys, (heads, n, d_v), (1, d), (shared, 1, d)
    )
    keys = keys * np.dtype(dtype).type(d**-0.25)
    phi = exponential(keys, -keys[..., ::-1], -(d**-0.5), (center[0], center[1]) if form == "centred" else None)
    some = np.random.default_rng(1).random((shared, n_kv)) < 0.6
    seen = {"none": None, "some": some, "a head sees nothing": some & (np.arange(shared) > 0)[:, None]}[mask]
    got = gradients(compiled_calls.product(q, k, v, phi=phi, key_mask=seen, save=True), phi, grad)
    given = [q, k, v, *phi.weights]
    check(got, autograd(lambda *x: product(phi.phi.scale, seen, *x), given, grad), dtype)


@pytest.mark.parametrize("mask", ["none", "some", "a head sees nothing"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [x[:-1] for x in SIZES])
def test_gradient_of_linear_attention(size: tuple[int, ...], dtype: str, mask: str) -> None:
    heads, shared, n, n_kv, d, d_v = size
    q, k, v, grad = draw(dtype, (heads, n, d), (shared, n_kv, d), (shared, n_kv, d_v), (heads, n, d_v))
    q[0, 0, 0] = k[0, 0, 0] = 0  # where the map is not smooth but for its first derivative
    some = np.random.default_rng(1).random((shared, n_kv)) < 0.6
    seen = {"none": None, "some": some, "a head sees nothing": some & (np.arange(shared) > 0)[:, None]}[mask]
    phi = elu(0.7, -1.3)

    def definition(q: Any, k: Any, v: Any) -> Any:
        phi_q, phi_k = (torch.nn.functional.elu(z) + 1 for z in (phi.phi.scale_q * q, phi.phi.scale_k * k))
        return means(torch.log(phi_q @ phi_k.transpose(-1, -2)), v, seen)

    got = gradients(compiled_calls.product(q, k, v, phi=phi, key_mask=seen, save=True), phi, grad)[:3]
    check(got, autograd(definition, [q, k, v], grad), dtype)


@pytest.mark.parametrize("mask", ["none", "some", "a head sees nothing"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "size", [(2, 2, 600, 70, 16, 9), (4, 1, 60, 700, 20, 33), (2, 1, 40, 700, 32, 16), (1, 1, 5000, 64, 64, 64)]
)
def test_gradient_of_softmax_attention(size: tuple[int, ...], dtype: str, mask: str) -> None:
    heads, shared, n, n_kv, d, d_v = size
    q, k, v, grad = draw(dtype, (heads, n, d), (shared, n_kv, d), (shared, n_kv, d_v), (heads, n, d_v))
    some = np.random.default_rng(1).random((shared, n_kv)) < 0.6
    seen = {"none": None, "some": some, "a head sees nothing": some & (np.arange(shared) > 0)[:, None]}[mask]
    got = softmax_gradients(q, k, v, grad, scale=-0.3, key_mask=seen)
    check(got, autograd(lambda *x: softmax(-0.3, seen, *x), [q, k, v], grad), dtype)


@pytest.mark.parametrize(("n", "n_kv"), [(600, 40), (40, 600)])
def test_rows_anywhere_have_the_numbers_of_rows_together(n: int, n_kv: int) -> None:
    """Heads lie between rows and channels, as a projection leaves them; rows are whole vectors, and so read in place."""
    q, k, v = draw("float32", (n, 3, 32), (n_kv, 3, 32), (n_kv, 3, 16))
    (grad,) = draw("float32", (3, n, 16))
    apart = [x.swapaxes(0, 1) for x in (q, k, v)]
    together = [x.copy() for x in apart]
    of_apart, of_together = (softmax_gradients(*x, grad, scale=0.3) for x in (apart, together))
    outs = [compiled_calls.softmax(*x, scale=0.3) for x in (apart, together)]
    for got, expected in [*zip(of_apart, of_together, strict=True), outs]:
        assert np.array_equal(got, expected)


@pytest.mark.parametrize(("shape", "iterations"), [((2, 33, 33), 2), ((3, 20, 20), 6), ((5, 5), 0), ((1, 1, 1), 3)])
def test_gradient_of_the_pseudo_inverse(shape: tuple[int, ...], iterations: int) -> None:
    compiled, static = COMPILED["iterative_pinv"], {"iterations": iterations}
    a, grad = draw("float64", shape, shape)
    if shape[0] == 3:
        a[1] = 0
        a[2, 4] = 0
    (got,) = compiled.backward((a,), static, None, (None,), (grad,), (True,))
    check([got], autograd(lambda a: iterative_pinv.generic(a, **static), [a], grad), "float64")


def test_threads_do_not_change_a_bit() -> None:
    q, k, v, keys, grad = draw("float32", (2, 4500, 16), (2, 4500, 16), (2, 4500, 8), (16, 40), (2, 4500, 8))
    phi = exponential(keys / 2, keys / 2, 0.25)
    done = compiled_calls.product(q, k, v, phi=phi, save=True)
    found = [gradients(done, phi, grad, threads=threads)[:3] for threads in (1, 2, 3)]
    for one, *others in zip(*found, strict=True):
        assert all(np.array_equal(one, other) for other in others)


def test_hidden_numbers_are_not_read() -> None:
    """What a mask hides may be NaN: its gradient is 0, and that of everything else what it was."""
    q, k, v, keys, grad = draw("float32", (1, 600, 8), (1, 70, 8), (1, 70, 8), (8, 24), (1, 600, 8))
    mask = np.arange(70)[None] % 7 > 0
    dirty = [np.where(mask[..., None], x, np.nan) for x in (k, v)]
    phi = exponential(keys / 2, keys / 2, 0.25)
    for a, b, c, g in ((q, k, v, grad), (q, *dirty, grad)):
        found = gradients(compiled_calls.product(a, b, c, phi=phi, key_mask=mask, save=True), phi, g)
        also = softmax_gradients(a, b, c, g, scale=0.3, key_mask=mask)
        for by_q, by_k, by_v in (found[:3], also):
            assert np.isfinite(by_q).all()
            assert (by_k[0, ::7] == 0).all()
            assert (by_v[0, ::7] == 0).all()
            assert (by_k[0, 1::7] != 0).any()
    q[0, 3] = np.nan
    for by in softmax_gradients(q, k, v, grad, scale=0.3, key_mask=mask)[1:]:
        assert (by[0, ::7] == 0).all()
    for by in softmax_gradients(q, k, v, grad, scale=0.3, key_mask=mask & False):
        assert (by == 0).all()


GUARDED = """
import ctypes, math, numpy, sys
sys.path.insert(0, "tests")
from compiled_calls import causal_product, exponential, gradients, product, softmax_gradients
libc, page = ctypes.CDLL(None), 4096
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def guarded(*shape):
    "An array that ends where memory ends."
    size = 4 * math.prod(shape)
    whole = -(-size // page) * page
    start = libc.mmap(None, whole + page, 3, 0x22, -1, 0)
    assert libc.mprotect(start + whole, page, 0) == 0
    x = numpy.frombuffer((ctypes.c_char * size).from_address(start + whole - size), numpy.float32).reshape(shape)
    x[...] = 0.1
    return x
numpy.empty, empty = lambda shape, *rest, **more: (
    guarded(*shape) if rest and rest[0] == numpy.float32 else empty(shape, *rest, **more)), numpy.empty  # results too end where memory ends
for n, n_kv, m in ((257, 31, 300), (600, 40, 17), (5, 700, 513)):
    q, k, v, W, grad = guarded(2, n, 7), guarded(2, n_kv, 7), guarded(2, n_kv, 5), guarded(7, m), guarded(2, n, 5)
    phi, options = exponential(W, W, 0.5, (guarded(1, 7), guarded(1, 7))), {"save": True, "new": numpy.empty}
    gradients(product(q, k, v, phi=phi, **options), phi, grad)
    softmax_gradients(q, k, v, grad, scale=1.0)
    phi = exponential(W, W, 0.5)
    gradients(causal_product(q, k, v, phi=phi, **options), phi, grad)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="numbers of Linux")
def test_nothing_is_read_or_written_behind_an_array() -> None:
    assert python(GUARDED) == "done"


CALLS = {
    "favor": ("favor", {"num_features": 12}, (2, 40, 8), (2, 50, 8)),
    "hyperbolic": ("favor", {"num_features": 12, "features": "hyperbolic"}, (2, 40, 8), (2, 50, 8)),
    "causal": ("favor", {"num_features": 12, "causal": True}, (2, 4, 140, 8), (2, 1, 150, 8)),
    "causal linear": ("linear", {"causal": True}, (2, 4, 140, 8), (2, 1, 90, 8)),
    "centred": ("favor", {"num_features": 12, "center": True}, (2, 4, 40, 8), (2, 1, 50, 8)),
    "derf": ("favor", {"num_features": 12, "features": "derf"}, (2, 4, 40, 8), (2, 2, 50, 8)),
    "few keys": ("exact", {}, (2, 4, 4200, 64), (2, 2, 40, 64)),
    "few queries": ("exact", {}, (2, 4, 40, 64), (2, 2, 4200, 64)),
    "nystrom": ("nystrom", {"num_landmarks": 30}, (1, 4, 5000, 64), (1, 2, 5000, 64)),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_torch_gradients_are_those_of_the_generic_form(name: str, masked: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    method, options, rows, keys = CALLS[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = random(*rows), random(*keys), random(*keys[:-1], 6)
    mask = torch.rand(keys[-2], generator=generator) < 0.7 if masked else None
    weight = random(*rows[:-1], 6).detach()

    def grads(**more: Any) -> Any:
        out = subquad.attention(q, k, v, method, key_mask=mask, **options, **more)
        return torch.autograd.grad((out * weight).sum(), (q, k, v))

    assert subquad.explain(subquad.attention, q, k, v, method, key_mask=mask, **options).implementation == "compiled"
    with FlopCounterMode(display=False):  # what watches operations sees those of the generic form
        expected = grads()
    for got, want in zip(grads(), expected, strict=True):
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= 1e-12 * float(want.abs().max())


@pytest.mark.parametrize("center", [False, True])
def test_torch_differentiates_twice(center: bool) -> None:
    q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    method = subquad.Favor(num_features=6, center=center)
    assert torch.autograd.gradgradcheck(lambda *x: subquad.attention(*x, method), (q, k, v), fast_mode=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["favor", "few keys"])
def test_torch_transforms_of_a_function_that_closes_over_the_tensors(name: str) -> None:
    method, options, rows, keys = CALLS[name]
    q, k, v = torch.randn(rows, requires_grad=True), torch.randn(keys), torch.randn(keys)

    def loss(s: Any) -> Any:
        return s * subquad.attention(q, k, v, method, **options).sum()

    one = torch.ones(())
    want = float(loss(one))
    for got in (torch.vmap(loss)(torch.ones(2))[1], torch.func.grad(loss)(one)):
        assert abs(float(got) - want) <= 1e-3 * (1 + abs(want))


@pytest.mark.filterwarnings("ignore")
def test_torch_script_keeps_attention() -> None:
    q, k = torch.randn(1, 600, 16, requires_grad=True), torch.randn(1, 40, 16)
    traced = torch.jit.trace(lambda q: subquad.attention(q, k, k, "exact"), (q,), check_trace=False)
    torch.jit.save(traced, io.BytesIO())
    assert torch.allclose(traced(2 * q), subquad.attention(2 * q, k, k, "exact"), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_torch_compiles_exact_attention_of_any_length() -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda x: subquad.attention(x, x, x, "exact"), fullgraph=True, backend="aot_eager")
    for n in (600, 700, 800):  # from the second on a length is a variable
        x = torch.randn(1, n, 8, requires_grad=True)
        assert torch.allclose(function(x), subquad.attention(x, x, x, "exact"), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["favor", "few keys", "few queries"])
def test_torch_gradients_of_gradients_that_are_not_plain(name: str) -> None:
    """Batched ones, as of a vectorised Jacobian, those with a tangent, and those of a compiled backward pass."""
    from torch._dynamo import compiled_autograd

    method, options, rows, keys = CALLS[name]
    given = [torch.randn(x, dtype=torch.float64, requires_grad=True) for x in (rows, keys, keys)]
    out = subquad.attention(*given, method, **options)
    grad = torch.randn(2, *out.shape, dtype=torch.float64)

    def pull(x: Any, **more: Any) -> Any:
        return torch.autograd.grad(out, given, x, retain_graph=True, **more)

    want = [pull(x) for x in grad]
    one = pull(grad[:1], is_grads_batched=True)
    assert all(torch.equal(x[0], y) for x, y in zip(one, want[0], strict=True))
    for got in (pull(grad, is_grads_batched=True), torch.func.vmap(pull)(grad)):
        for x, *each in zip(got, *want, strict=True):
            assert torch.allclose(x, torch.stack(each))
            assert not x.requires_grad
    with torch.autograd.forward_ad.dual_level():
        found = pull(torch.autograd.forward_ad.make_dual(*grad))
        tangents = [torch.autograd.forward_ad.unpack_dual(x).tangent for x in found]
    assert all(map(torch.allclose, tangents, want[1]))
    with compiled_autograd._enable(torch.compile(backend="eager")):
        out.backward(grad[0])
    assert all(torch.allclose(x.grad, by) for x, by in zip(given, want[0], strict=True))


@pytest.mark.parametrize("center", [False, True])
def test_torch_gradients_to_go_on_with_are_the_same(center: bool) -> None:
    """The generic form gives them, and what a center was computed from must not count twice."""
    q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    out = subquad.attention(q, k, v, "favor", num_features=6, center=center)
    plain, further = (torch.autograd.grad(out.sin().sum(), (q, k, v), retain_graph=True, create_graph=more)
                      for more in (False, True))  # fmt: skip
    for one, other in zip(plain, further, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_torch_threads_do_not_change_a_bit() -> None:
    """PyTorch's own threads share the tasks: every one is done, once, however many threads there are."""
    q, k, v = torch.randn(3, 3, 4300, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = subquad.attention(q, k, v, "favor", num_features=40)
            causal = subquad.attention(q, k, v, "favor", num_features=40, causal=True)
            found.append([out, causal, *torch.autograd.grad((out * causal).sum(), (q, k, v))])
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_torch_directions_can_be_trained() -> None:
    q, k, v = (torch.randn(2, 9, 4, dtype=torch.float64) for _ in range(3))
    omega = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: subquad.attention(q, k, v, "favor", omega=x), (omega,), fast_mode=True)


def test_torch_notices_inputs_changed_in_place() -> None:
    q, k, v = (torch.randn(2, 9, 4) for _ in range(3))
    k.requires_grad_()
    out = subquad.attention(q, k, v, "favor", num_features=8)
    v += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


FORK = """
import multiprocessing, sys, torch, subquad
from subquad_torch.openmp import parallel_function, threads

def train(n):
    torch.set_num_threads(2)
    q, k, v = (torch.ones(1, 4, n, 16).requires_grad_() for _ in range(3))
    out = subquad.attention(q, k, v, "favor", num_features=64)
    return float(torch.autograd.grad(out.sum(), v)[0].sum()) - q.nelement()

assert isinstance(threads(), int)
assert sys.platform != "linux" or parallel_function() is not None
fork = multiprocessing.get_context("fork")
for n in (3000, 500):  # PyTorch's own operations use threads for more than 32,768 numbers
    with fork.Pool(1) as pool:
        assert abs(pool.apply_async(train, (n,)).get(100)) < 1
    train(3000)
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_after_a_fork() -> None:
    """PyTorch's threads are gone then; ours are begun anew. In an interpreter of its own, since PyTorch hangs in a
    child that uses its threads where the parent did so before."""
    python(FORK)
