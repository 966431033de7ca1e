"""The linear scan equals the loop that defines it; so do its gradients, under every transform of every library."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from rows import definitions
from rows.libraries import LIBRARIES, CuPy, Jax, Library, NumPy, Strict, Torch, relative_error, tolerance

import subquad

D = 5
LENGTHS = (1, 2, 16, 17, 63, 257)  # one run, the last step of it, two runs, ragged ones


@dataclass(frozen=True)
class Form:
    """One form of the call: which inputs are complex, and their batch axes; no `state` is no initial state."""

    name: str
    a: tuple[int, ...] = (2,)
    b: tuple[int, ...] = (2,)
    state: tuple[int, ...] | None = None
    complex_: str = ""  # of "a", "b", "s"
    reverse: bool = False

    def draw(self, n: int, seed: int = 3) -> tuple[np.ndarray | None, ...]:
        """(a, b, initial state), float64: factors of either sign from 0.5 to 1, and now and then 0."""
        rng = np.random.default_rng(seed)

        def normal(which: str, *shape: int) -> np.ndarray:
            x = rng.standard_normal(shape)
            return x + 1j * rng.standard_normal(shape) if which in self.complex_ else x

        direction = normal("a", *self.a, n, D)
        size = rng.uniform(0.5, 1, direction.shape) * (rng.random(direction.shape) > 0.02)
        state = None if self.state is None else normal("s", *self.state, D)
        return size * direction / np.abs(direction), normal("b", *self.b, n, D), state

    def call(self, implementation: str = "auto") -> Callable[..., Any]:
        """(h, state) of (a, b) or (a, b, initial state)."""

        def scan(a: Any, b: Any, initial_state: Any = None) -> Any:
            options = {"reverse": self.reverse, "return_state": True, "implementation": implementation}
            return subquad.linear_scan(a, b, initial_state=initial_state, **options)

        return scan

    def reference(self, drawn: tuple[np.ndarray | None, ...]) -> tuple[np.ndarray, np.ndarray]:
        return definitions.linear_scan(*drawn, reverse=self.reverse)


FORMS = [
    Form("plain"),
    Form("state", state=(2,)),
    Form("reverse", state=(2,), reverse=True),
    Form("complex", complex_="abs", state=(2,)),
    Form("reverse-complex", complex_="abs", state=(2,), reverse=True),
    Form("real-factors", complex_="b"),
    Form("complex-state", complex_="s", state=(2,)),
    Form("one-sequence", a=(), b=(), state=()),
    Form("broadcast", a=(3,), b=(2, 1), state=(1,)),
]


def forms(*names: str) -> Any:
    """`pytest.mark.parametrize` over the table, or the rows named."""
    table = [form for form in FORMS if not names or form.name in names]
    return pytest.mark.parametrize("form", [pytest.param(form, id=form.name) for form in table])


implementations = pytest.mark.parametrize("implementation", ["auto", "generic"])
COMBINATIONS = [
    pytest.param(*library.values, form, n, choice, id=f"{library.id}-{form.name}-n={n}-{choice}", marks=library.marks)
    for library in LIBRARIES
    for form in FORMS
    for n in LENGTHS
    for choice in ("auto", "generic")
    # a row that catches one kind of mistake needs no more than each way through the code; tracing takes long
    if type(library.values[0]) in (NumPy, Strict, Torch, CuPy)
    or (n == 63 and (not isinstance(library.values[0], Jax) or choice == "auto" or "reverse" in form.name))
]


@pytest.mark.parametrize(("library", "form", "n", "implementation"), COMBINATIONS)
def test_equals_the_loop(library: Library, form: Form, n: int, implementation: str) -> None:
    drawn = form.draw(n)
    for dtype in library.dtypes:
        got = library.call(form.call(implementation), *drawn, dtype=dtype)
        # float32 and float64 round alike everywhere, and meta tensors have nothing to read
        rounding = library if dtype == "bfloat16" else NumPy()
        expected = form.reference(rounding.rounded(drawn, dtype))
        # the state is at least float32; complex numbers have no less either
        held = library.target(np.zeros(1, expected[0].dtype), "float32" if dtype == "bfloat16" else dtype)
        assert library.dtype_name(got[0]) == (held if form.complex_ else dtype)
        assert library.dtype_name(got[1]) == held
        for x, reference in zip(got, expected, strict=True):
            assert tuple(x.shape) == reference.shape
            if library.has_values:
                assert relative_error(library.numpy(x), reference) <= tolerance(dtype)


def test_half_precision_is_rounded_once() -> None:
    """Sums of 2000 ones: float16 alone would stop at 2048, and lose halves from 1024 on."""
    ones = np.ones((2000, 1), np.float16)
    h, state = subquad.linear_scan(ones, ones * np.float16(1.5), return_state=True)
    assert (h.dtype, state.dtype) == (np.float16, np.float32)
    assert np.array_equal(h[:, 0], (1.5 * np.arange(1, 2001)).astype(np.float16))
    assert state[0] == 3000


@pytest.mark.parametrize("d", [7, 50, 64])
@pytest.mark.parametrize("kinds", [("f2", "f2"), ("f2", "f4"), ("f4", "f2"), ("bfloat16", "bfloat16")], ids=str)
def test_how_numbers_are_stored_changes_no_bit(kinds: tuple[str, str], d: int) -> None:
    """Loops of their own for arrays of one kind give the numbers of float32, rounded once."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    a, b = (0.5 * rng.standard_normal((2, 300, d)) for _ in kinds)
    a, b = (x.astype(getattr(ml_dtypes, kind, kind)) for x, kind in zip((a, b), kinds, strict=True))
    h = subquad.linear_scan(a, b)
    assert h.dtype == (a.dtype if a.dtype == b.dtype else np.float32)
    expected = subquad.linear_scan(a.astype("f4"), b.astype("f4")).astype(h.dtype)
    assert np.array_equal(h.astype("f4"), expected.astype("f4"))


def test_long_doubles_stay_long() -> None:
    """No kernel takes them, and none cuts them short."""
    a, b, _ = (None if x is None else x.astype(np.longdouble) for x in FORMS[0].draw(40))
    explanation = subquad.explain(subquad.linear_scan, a, b)
    assert (explanation.implementation, "not in" in dict(explanation.declined)["compiled"]) == ("generic", True)
    h = subquad.linear_scan(a, b)
    assert h.dtype == np.longdouble
    assert relative_error(h, definitions.linear_scan(a, b)[0]) <= 64 * np.finfo(np.longdouble).eps


def test_state_of_higher_precision_does_not_change_the_dtype_of_h() -> None:
    a, b, state = FORMS[1].draw(9)
    h, last = subquad.linear_scan(a.astype("f4"), b.astype("f4"), initial_state=state, return_state=True)
    assert (h.dtype, last.dtype) == (np.float32, np.float64)


@pytest.mark.parametrize("chunk", [1, 7, 50])
@implementations
@forms()
def test_full_equals_chunks(form: Form, implementation: str, chunk: int) -> None:
    n = 65
    a, b, state = form.draw(n)
    full, last = form.call(implementation)(a, b, state)
    parts = {}
    starts = range(0, n, chunk)
    for start in reversed(starts) if form.reverse else starts:
        rows = slice(start, start + chunk)
        parts[start], state = form.call(implementation)(a[..., rows, :], b[..., rows, :], state)
    assert relative_error(np.concatenate([parts[start] for start in starts], axis=-2), full) <= tolerance("float64")
    assert relative_error(state, last) <= tolerance("float64")


@implementations
def test_reverse_is_the_scan_of_the_flipped_sequence(implementation: str) -> None:
    a, b, state = FORMS[1].draw(63)
    forward = Form("", reverse=False).call(implementation)(np.flip(a, -2), np.flip(b, -2), state)
    backward = Form("", reverse=True).call(implementation)(a, b, state)
    assert np.array_equal(np.flip(forward[0], -2), backward[0])
    assert np.array_equal(forward[1], backward[1])


@implementations
@forms("state", "complex", "reverse")
def test_item_alone_equals_item_in_batch(form: Form, implementation: str) -> None:
    drawn = form.draw(63)
    for whole, part in zip(
        form.call(implementation)(*drawn), form.call(implementation)(*(x[:1] for x in drawn)), strict=True
    ):
        assert np.array_equal(whole[:1], part)


@implementations
@pytest.mark.parametrize("name", ["a", "b"])
@forms("plain", "reverse", "complex")
def test_what_is_not_finite_reaches_later_steps_of_its_channel(form: Form, name: str, implementation: str) -> None:
    """And not the last bit of any other number."""
    a, b, state = form.draw(150)
    clean, _ = form.call(implementation)(a, b, state)
    {"a": a, "b": b}[name][1, 70, 2] = np.nan
    dirty, _ = form.call(implementation)(a, b, state)
    reached = np.zeros(clean.shape, dtype=bool)
    reached[1, slice(None, 71) if form.reverse else slice(70, None), 2] = True
    assert np.array_equal(np.isnan(dirty), reached)
    assert np.array_equal(dirty[~reached], clean[~reached])


@implementations
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("factor", [0.0, 1e-30, 1 - 1e-6, 1.0, -1.0])
def test_no_factor_is_too_small(factor: float, dtype: str, implementation: str) -> None:
    """Products underflow to 0 and do no harm: nothing is divided by them."""
    a, b, state = FORMS[1].draw(257)
    given = [x.astype(dtype) for x in (np.full_like(a, factor), b, state)]
    h, _ = FORMS[1].call(implementation)(*given)
    expected = definitions.linear_scan(*(x.astype(np.float64) for x in given))[0]
    assert relative_error(h, expected) <= tolerance(dtype)


def test_generic_takes_no_more_steps_for_a_longer_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("subquad.kernels.linear_scan")  # the package's attribute is the function
    driver, steps = module.fold_blocks, []

    def counted(step: Any, carry: Any, arrays: Any, size: int, **options: Any) -> Any:
        steps.append(arrays[0].shape[-2] / size)
        return driver(step, carry, arrays, size, **options)

    monkeypatch.setattr(module, "fold_blocks", counted)
    for n in (100, 10_000):
        steps.clear()
        subquad.linear_scan(*np.ones((2, n, 1)), implementation="generic")
        assert 0 < sum(steps) <= 2 * module.RUN


@implementations
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 4, 0)], ids=str)
def test_empty(shape: tuple[int, ...], implementation: str) -> None:
    x, state = np.ones(shape), np.arange(1.0, shape[2] + 1)
    h, last = Form("").call(implementation)(x, x, state)
    assert h.shape == shape
    assert last.shape == (shape[0], shape[2])
    if shape[1] == 0:
        assert np.array_equal(last, [state, state])
        assert np.array_equal(Form("").call(implementation)(x, x)[1], np.zeros((2, 3)))


@pytest.mark.parametrize("library", [Torch(), Jax()], ids=str)
def test_empty_elsewhere(library: Library) -> None:
    empty, state = np.ones((2, 0, 3)), np.ones((2, 3))
    h, last = library.call(FORMS[1].call(), empty, empty, state, dtype="float64")
    assert tuple(h.shape) == (2, 0, 3)
    assert np.array_equal(library.numpy(last), state)


def test_state_is_no_view_of_the_sequence() -> None:
    a, b, _ = FORMS[0].draw(20)
    for implementation in ("auto", "generic"):
        h, state = FORMS[0].call(implementation)(a, b)
        assert not np.shares_memory(h, state)


@implementations
@forms("plain", "state", "reverse", "complex", "reverse-complex", "broadcast")
def test_torch_gradcheck(form: Form, implementation: str) -> None:
    """Of every input through h and the last state, once and twice."""
    torch = pytest.importorskip("torch")
    n = 4 if implementation == "auto" else 18  # two runs
    tensors = [torch.from_numpy(x).requires_grad_() for x in form.draw(n) if x is not None]
    assert torch.autograd.gradcheck(form.call(implementation), tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(form.call(implementation), tensors, fast_mode=True)


def weighted(form: Form, implementation: str, h_of: Callable[[Any], Any]) -> Callable[..., Any]:
    """A real loss in which every entry of h counts differently."""

    def loss(*given: Any) -> Any:
        h, state = form.call(implementation)(*given)
        return (h_of(h) ** 2).sum() + h_of(state * (1 + 0.5j) if "a" in form.complex_ else state).sum()

    return loss


@functools.cache
def torch_gradients(form: Form, n: int) -> list[np.ndarray]:
    """The gradients of the generic form by PyTorch's own rules, ∂/∂Re + i ∂/∂Im."""
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x).requires_grad_() for x in form.draw(n) if x is not None]
    weighted(form, "generic", lambda h: h.real)(*tensors).backward()
    return [x.grad.resolve_conj().numpy() for x in tensors]


@implementations
@forms("plain", "state", "reverse", "complex", "reverse-complex")
def test_gradient_is_the_same_on_jax_and_torch(jax_library: Jax, form: Form, implementation: str) -> None:
    """Of the kernel and of the generic form; JAX's is the conjugate."""
    n = 40
    with jax_library.context("float64"):
        import jax

        given = [jax_library.array(x, "float64") for x in form.draw(n) if x is not None]
        loss = weighted(form, implementation, lambda h: h.real)
        found = jax.jit(jax.grad(loss, argnums=tuple(range(len(given)))))(*given)
    for ours, theirs in zip(found, torch_gradients(form, n), strict=True):
        assert relative_error(np.conj(np.asarray(ours)), theirs) <= tolerance("float64")


@pytest.mark.parametrize("again", [False, True])
@forms("plain", "state", "reverse", "complex", "reverse-complex")
def test_torch_gradient_of_the_kernel_is_that_of_the_generic_form(form: Form, again: bool) -> None:
    """Compiled, and as the scans that it is made of when it is to be differentiated again."""
    torch = pytest.importorskip("torch")
    n = 40
    tensors = [torch.from_numpy(x).requires_grad_() for x in form.draw(n) if x is not None]
    found = torch.autograd.grad(weighted(form, "auto", lambda h: h.real)(*tensors), tensors, create_graph=again)
    for got, expected in zip(found, torch_gradients(form, n), strict=True):
        assert relative_error(got.detach().resolve_conj().numpy(), expected) <= tolerance("float64")


@forms("state", "reverse")
def test_jax_differentiates_twice(jax_library: Jax, form: Form) -> None:
    from jax.test_util import check_grads

    with jax_library.context("float64"):
        given = tuple(jax_library.array(x, "float64") for x in form.draw(5))
        check_grads(form.call(), given, order=2, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_only_the_gradients_asked_for_come() -> None:
    torch = pytest.importorskip("torch")
    a, b, state = (torch.from_numpy(x) for x in FORMS[1].draw(9))
    h, _ = FORMS[1].call()(a, b.requires_grad_(), state)
    h.sum().backward()
    assert a.grad is None
    assert state.grad is None
    expected = definitions.linear_scan(*(np.flip(x, -2) for x in (shifted(a.numpy()), np.ones(h.shape))))[0]
    assert relative_error(b.grad.numpy(), np.flip(expected, -2)) <= tolerance("float64")


def shifted(a: np.ndarray) -> np.ndarray:
    """a[t+1] at place t: the factors of the scan that runs back through the gradient."""
    return np.concatenate([a[:, 1:], np.zeros_like(a[:, :1])], axis=1)


@implementations
@forms("state", "reverse-complex")
def test_torch_compile_full_graph(form: Form, implementation: str) -> None:
    """Forward and backward, without a graph break."""
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    ours, theirs = ([torch.from_numpy(x).requires_grad_() for x in form.draw(40)] for _ in range(2))
    compiled = torch.compile(form.call(implementation), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*ours), form.call("generic")(*theirs), strict=True):
        assert relative_error(got.detach().numpy(), expected.detach().numpy()) <= tolerance("float64")
    for tensors, function in ((ours, compiled), (theirs, form.call("generic"))):
        function(*tensors)[0].abs().square().sum().backward()
    for got, expected in zip(ours, theirs, strict=True):
        assert relative_error(got.grad.numpy(), expected.grad.numpy()) <= tolerance("float64")
    torch._dynamo.reset()


@forms("state", "reverse-complex")
def test_torch_func(form: Form) -> None:
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x) for x in form.draw(20)]
    mapped = torch.func.vmap(form.call())(*tensors)
    for got, expected in zip(mapped, form.call()(*tensors), strict=True):
        assert relative_error(got.numpy(), expected.numpy()) <= tolerance("float64")
    loss = weighted(form, "auto", lambda h: h.real)
    found = torch.func.grad(loss, argnums=(0, 1, 2))(*tensors)
    for got, expected in zip(found, torch_gradients(form, 20), strict=True):
        assert relative_error(got.resolve_conj().numpy(), expected) <= tolerance("float64")


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_torch_forward_mode_keeps_the_tangent(needs_gradient: bool) -> None:
    """h is linear in b: the tangent of h along b is h. An operator without a rule would lose it silently."""
    forward_ad = pytest.importorskip("torch").autograd.forward_ad
    import torch

    a, b, _ = (None if x is None else torch.from_numpy(x) for x in FORMS[0].draw(20))
    with forward_ad.dual_level():
        h, _ = FORMS[0].call()(a, forward_ad.make_dual(b.requires_grad_(needs_gradient), b.detach()))
        value, tangent = forward_ad.unpack_dual(h)
        assert tangent is not None
        assert relative_error(tangent.detach().numpy(), value.detach().numpy()) <= tolerance("float64")


@forms("state", "reverse")
def test_jax_transforms(jax_library: Jax, form: Form) -> None:
    import jax

    with jax_library.context("float64"):
        given = [jax_library.array(x, "float64") for x in form.draw(20)]
        for got, expected in zip(jax.vmap(jax.jit(form.call()))(*given), form.call()(*given), strict=True):
            assert relative_error(np.asarray(got), np.asarray(expected)) <= tolerance("float64")
        loss = jax.grad(weighted(form, "auto", lambda h: h.real), argnums=(0, 1, 2))
        each = jax.jit(jax.vmap(loss))(*given)
    for got, expected in zip(each, torch_gradients(form, 20), strict=True):
        assert relative_error(np.asarray(got), expected) <= tolerance("float64")


def test_jax_forward_mode_of_the_generic_form(jax_library: Jax) -> None:
    import jax

    with jax_library.context("float64"):
        a, b, state = (jax_library.array(x, "float64") for x in FORMS[1].draw(20))
        scan = FORMS[1].call("generic")
        _, (tangent, _) = jax.jvp(lambda b: scan(a, b, state), (b,), (b,))
        assert relative_error(np.asarray(tangent), np.asarray(scan(a, b)[0])) <= tolerance("float64")
