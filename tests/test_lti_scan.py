"""The fixed scan: it equals its definition and the convolution by FFT, and chunks, steps and documents are the whole."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, relative_error, tolerance

import subquad
from subquad.kernels import lti_scan as scan_kernel
from subquad.registry import SCANS

D, D_STATE = 19, 3  # a vector and a part of one; a pair of states and one more
implementations = pytest.mark.parametrize("implementation", ["auto", "generic"])
complex_or_real = pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Inputs of a scan of two items."""

    n: int
    complex_: bool
    dtype: str = "float64"

    def arrays(self) -> dict[str, Array]:
        rng, shape = np.random.default_rng(self.n), (D, D_STATE)

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if self.complex_ else 0)

        A = -rng.uniform(0.1, 2, shape) + (1j * rng.uniform(-8, 8, shape) if self.complex_ else 0)
        given = {"u": rng.standard_normal((2, self.n, D)), "A": A, "B": normal(*shape), "C": normal(*shape)}
        given |= {"D": rng.standard_normal(D), "delta": np.exp(rng.uniform(-6, 0, D))}
        given["initial_state"] = normal(2, *shape)
        kinds = {"f": self.dtype, "c": "complex64" if self.dtype == "float32" else "complex128"}
        return {name: x.astype(kinds[x.dtype.kind]) for name, x in given.items()}


def call(arrays: dict[str, Any], **options: Any) -> Any:
    return SCANS["lti_scan"].call(arrays, options)


@implementations
@complex_or_real
@pytest.mark.parametrize("rule", ["zoh", "bilinear", "euler", "mamba"])
@pytest.mark.parametrize(("n", "reverse"), [(1, False), (64, True), (63, False), (257, False)])
def test_equals_the_loop(n: int, reverse: bool, rule: str, complex_: bool, implementation: str) -> None:
    arrays, options = Drawn(n, complex_).arrays(), {"discretization": rule, "reverse": reverse}
    y = call(arrays, implementation=implementation, **options)
    reference = SCANS["lti_scan"].reference
    assert reference is not None
    assert relative_error(y, reference(arrays, options)) <= tolerance("float64", n=1000)


@implementations
@complex_or_real
def test_equals_the_convolution_by_fft(complex_: bool, implementation: str) -> None:
    """K[i] = C·(Āⁱ B̄), over several spans of the generic form."""
    n = 9000
    arrays = Drawn(n, complex_).arrays()
    del arrays["initial_state"]
    A_bar, B_bar = subquad.discretize(arrays["A"], arrays["B"], arrays["delta"], "zoh")
    powers = np.exp(np.arange(n)[:, None, None] * np.log(A_bar))
    K = (arrays["C"] * B_bar * powers).sum(-1)
    K = 2 * K.real if complex_ else K
    u = arrays["u"]
    expected = (
        np.fft.irfft(np.fft.rfft(u, 2 * n, axis=1) * np.fft.rfft(K, 2 * n, axis=0), axis=1)[:, :n] + arrays["D"] * u
    )
    assert relative_error(call(arrays, implementation=implementation), expected) <= 1e-12


@complex_or_real
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_any_split_gives_the_same_bits(dtype: str, reverse: bool, complex_: bool) -> None:
    n, arrays = 150, Drawn(150, complex_, dtype).arrays()
    y, last = call(arrays, return_state=True, reverse=reverse)
    assert (y.dtype, last.dtype) == (arrays["u"].dtype, arrays["A"].dtype)
    for chunk in (1, 7, 67):
        now, parts = arrays["initial_state"], {}
        for start in sorted(range(0, n, chunk), reverse=reverse):
            given = arrays | {"u": arrays["u"][:, start : start + chunk], "initial_state": now}
            parts[start], now = call(given, return_state=True, reverse=reverse)
        assert np.array_equal(np.concatenate([parts[start] for start in sorted(parts)], axis=1), y)
        assert np.array_equal(now, last)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_chunks_of_the_generic_form_are_the_whole(dtype: str) -> None:
    arrays = Drawn(200, True, dtype).arrays()
    y, last = call(arrays, return_state=True, implementation="generic")
    now, parts = arrays["initial_state"], []
    for start in range(0, 200, 77):
        given = arrays | {"u": arrays["u"][:, start : start + 77], "initial_state": now}
        part, now = call(given, return_state=True, implementation="generic")
        parts.append(part)
    assert relative_error(np.concatenate(parts, axis=1), y) <= tolerance(dtype)
    assert relative_error(now, last) <= tolerance(dtype)


@complex_or_real
def test_steps_give_the_same_bits(complex_: bool) -> None:
    arrays = Drawn(9, complex_, "float32").arrays()
    y, last = call(arrays, return_state=True)
    u, state = arrays.pop("u"), arrays.pop("initial_state")
    for t in range(9):
        out, state = subquad.lti_scan_step(
            state, u[:, t], *(arrays[name] for name in ("A", "B", "C", "D")), delta=arrays["delta"]
        )
        assert np.array_equal(out, y[:, t])
    assert np.array_equal(state, last)


@implementations
@complex_or_real
@pytest.mark.parametrize("reverse", [False, True])
def test_documents_and_padding(reverse: bool, complex_: bool, implementation: str) -> None:
    """Each document is as alone, without its padded steps; NaN in these, or in another document, changes nothing."""
    n, rng = 90, np.random.default_rng(0)
    arrays = Drawn(n, complex_).arrays()
    mask, segments = rng.random((2, n)) < 0.7, np.cumsum(rng.random((2, n)) < 0.1, axis=1)
    other = segments == 2
    arrays["u"] = np.where((mask & ~other)[..., None], arrays["u"], np.nan)
    options: dict[str, Any] = {"reverse": reverse, "return_state": True, "implementation": implementation}
    with np.errstate(invalid="ignore"):
        y, last, states = call(arrays, mask=mask, segments=segments, states_at=(0, 40, n), **options)
    assert np.array_equal(states[0], arrays["initial_state"])
    assert np.array_equal(states[2], last)
    same = np.array_equal if implementation == "auto" else (lambda a, b: relative_error(a, b) <= tolerance("float64"))
    for i in range(2):
        found = np.unique(segments[i][mask[i]])
        for segment in found:
            here = mask[i] & (segments[i] == segment)
            state = arrays["initial_state"][i] if segment == found[-1 if reverse else 0] else np.zeros((D, D_STATE))
            alone, after = call(arrays | {"u": arrays["u"][i][here], "initial_state": state}, **options)
            if segment != 2:
                assert same(y[i][here], alone)
            if segment == found[0 if reverse else -1]:
                assert same(last[i], after)
        assert not y[i][~mask[i]].any()


@implementations
def test_slow_decays_keep_their_digits(implementation: str) -> None:
    """In float32 Ā = exp(−5e-5) is known to 6e-8, which would change a memory of 20,000 steps by a thousandth."""
    u = np.random.default_rng(0).standard_normal((30_000, 1)).astype("f4")
    A, B, C = (np.full((1, 1), x, "f4") for x in (-0.5, 1, 1))
    y = subquad.lti_scan(u, A, B, C, delta=np.full(1, 1e-4, "f4"), implementation=implementation)
    wide = (x.astype("f8") for x in (u, A, B, C))
    expected = subquad.lti_scan(*wide, delta=np.full(1, 1e-4, "f4").astype("f8"))
    assert relative_error(y, expected) <= 2e-5


def test_nothing_comes_back_from_later_steps() -> None:
    arrays = Drawn(100, True).arrays()
    clean = call(arrays)
    arrays["u"] = arrays["u"].copy()
    arrays["u"][:, 60, 2] = np.nan
    dirty = call(arrays)
    assert np.array_equal(dirty[:, :60], clean[:, :60])
    assert np.array_equal(np.delete(dirty, 2, axis=-1), np.delete(clean, 2, axis=-1))
    assert np.isnan(dirty[:, 60:, 2]).all()


@implementations
@pytest.mark.parametrize("shape", [(2, 0, D), (0, 4, D)], ids=str)
def test_empty(shape: tuple[int, ...], implementation: str) -> None:
    arrays = Drawn(4, False).arrays()
    arrays |= {"u": np.ones(shape), "initial_state": arrays["initial_state"][: shape[0]]}
    y, last = call(arrays, return_state=True, implementation=implementation)
    assert y.shape == shape
    assert last.shape == (shape[0], D, D_STATE)
    if shape[1] == 0:
        assert np.array_equal(last, arrays["initial_state"])


@implementations
@complex_or_real
def test_torch_gradcheck(complex_: bool, implementation: str) -> None:
    """Of every input, through the discretisation and the last state, once and twice."""
    torch = pytest.importorskip("torch")
    drawn = Drawn(5, complex_).arrays()
    few = {name: x[..., :2] if name in ("u", "D", "delta") else x[..., :2, :2] for name, x in drawn.items()}
    tensors = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in few.items()}

    def scan(*given: Any) -> Any:
        return call(dict(zip(tensors, given, strict=True)), return_state=True, implementation=implementation)

    assert torch.autograd.gradcheck(scan, tuple(tensors.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(scan, tuple(tensors.values()), fast_mode=True)


def test_torch_compile_full_graph_and_vmap() -> None:
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    arrays = {name: torch.from_numpy(x) for name, x in Drawn(70, True).arrays().items()}
    u = arrays.pop("u")
    del arrays["initial_state"]

    def scan(u: Any) -> Any:
        return call({"u": u, **arrays})

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    ours, theirs = (u.clone().requires_grad_() for _ in range(2))
    compiled(ours).square().sum().backward()
    scan(theirs).square().sum().backward()
    assert relative_error(ours.grad.numpy(), theirs.grad.numpy()) <= tolerance("float64")
    assert torch.allclose(torch.func.vmap(scan)(u), scan(u), rtol=1e-12, atol=1e-12)


def test_jax_transforms(jax_library: Jax) -> None:
    with jax_library.context("float64"):
        import jax

        arrays = {name: jax_library.array(x, "float64") for name, x in Drawn(70, True).arrays().items()}
        names = ("u", "A", "delta")

        def loss(given: Any, implementation: str) -> Any:
            return (call(arrays | given, implementation=implementation) ** 2).sum()

        given = {name: arrays[name] for name in names}
        one, other = (jax.jit(jax.grad(loss), static_argnums=1)(given, name) for name in ("auto", "generic"))
        for name in names:
            assert relative_error(np.asarray(one[name]), np.asarray(other[name])) <= 4 * tolerance("float64")


def test_half_precision_is_computed_in_float32() -> None:
    arrays = {name: x.astype("f2" if x.dtype.kind == "f" else "c8") for name, x in Drawn(40, True).arrays().items()}
    y, last = call(arrays, return_state=True)
    assert (y.dtype, last.dtype) == (np.float16, np.complex64)
    wide = {name: x.astype("f4") if x.dtype == np.float16 else x for name, x in arrays.items()}
    assert np.array_equal(y, call(wide).astype("f2"))


def test_gradient_of_unbroadcast_mask_is_that_of_the_generic_form() -> None:
    torch = pytest.importorskip("torch")
    u, rate, maps = torch.randn(2, 50, 3), torch.full((3, 2), -0.1), torch.ones(3, 2)
    mask = torch.rand(1, 50) < 0.5
    found = []
    for implementation in ("auto", "generic"):
        leaves = [u.clone().requires_grad_(), rate.clone().requires_grad_()]
        y, _ = scan_kernel(*leaves, maps, maps, None, None, None, mask, reverse=False, implementation=implementation)
        found.append(torch.autograd.grad(y.square().sum(), leaves))
    for a, b in zip(*found, strict=True):
        assert relative_error(a.numpy(), b.numpy()) <= 4 * tolerance("float32")


U, M, V = np.ones((2, 5, 3)), np.ones((3, 4)), np.ones(3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "C is a NoneType", lambda: subquad.lti_scan(U, M, M, None, delta=V)),
        (TypeError, "delta is a float, not an array", lambda: subquad.lti_scan(U, M, M, M, delta=0.1)),
        (TypeError, "u has dtype complex128", lambda: subquad.lti_scan(U * 1j, M, M, M, delta=V)),
        (TypeError, "B is complex (complex128) but A is real", lambda: subquad.lti_scan(U, M, M * 1j, M, delta=V)),
        (ValueError, "u has shape (3,), expected (..., n, d)", lambda: subquad.lti_scan(V, M, M, M, delta=V)),
        (ValueError, "A has shape (4, 3), expected (3, d_state)", lambda: subquad.lti_scan(U, M.T, M, M, delta=V)),
        (ValueError, "C has shape (4, 3), expected (3, 4)", lambda: subquad.lti_scan(U, M, M, M.T, delta=V)),
        (ValueError, "delta has shape (4,), expected (3,)", lambda: subquad.lti_scan(U, M, M, M, delta=np.ones(4))),
        (ValueError, "initial_state has shape (2, 3), expected (..., 3, 4)",
         lambda: subquad.lti_scan(U, M, M, M, delta=V, initial_state=np.ones((2, 3)))),
        (ValueError, "state has shape (2, 3), expected (..., 3, 4)",
         lambda: subquad.lti_scan_step(np.ones((2, 3)), U[:, 0], M, M, M, delta=V)),
        (ValueError, "discretization is 'foh', expected one of 'zoh'",
         lambda: subquad.lti_scan(U, M, M, M, delta=V, discretization="foh")),
        (ValueError, "mask has shape (4,), expected (..., 5)",
         lambda: subquad.lti_scan(U, M, M, M, delta=V, mask=np.ones(4, bool))),
        (ValueError, "implementation is 'fft'", lambda: subquad.lti_scan(U, M, M, M, delta=V, implementation="fft")),
    ],
)  # fmt: skip
def test_errors(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_program_of_jax_holds_scans_whose_kernels_have_one_name() -> None:
    """Those of the fixed, the selective and the outer scan are called alike, each in its module."""
    jax = pytest.importorskip("jax")
    u, A = np.ones((5, 3), np.float32), -np.ones((3, 2), np.float32)
    ones = np.ones((3, 2), np.float32)
    state = np.ones((5, 2), np.float32)

    @jax.jit
    def both(u: Any, A: Any, ones: Any, state: Any) -> Any:
        fixed = subquad.lti_scan(u, A, ones, ones, delta=ones[:, 0])
        selective = subquad.selective_scan(u, u, A, state, state)
        return fixed, selective, subquad.gated_linear_attention(state, state, u)

    expected = (
        subquad.lti_scan(u, A, ones, ones, delta=ones[:, 0]),
        subquad.selective_scan(u, u, A, state, state),
        subquad.gated_linear_attention(state, state, u),
    )
    for got, wanted in zip(both(u, A, ones, state), expected, strict=True):
        assert relative_error(np.asarray(got), wanted) <= 1e-5
