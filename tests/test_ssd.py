"""Mamba-2's scan equals its definition and the selective scan whose A repeats one rate for each head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Library, NumPy, relative_error, tolerance

import subquad
from subquad.registry import SCANS

implementations = pytest.mark.parametrize("implementation", ["auto", "generic"])
definition = SCANS["ssd"].reference
Array = np.ndarray
POSITIONAL = ("x", "delta", "A", "B", "C", "D")
FORMS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # further inputs, and options
    "plain": ((), {}),
    "gated": (("D", "z", "delta_bias"), {"delta_softplus": True}),
    "limits": (("D by channel", "initial_state"), {"delta_softplus": True, "delta_limits": (0.1, 0.8)}),
    "upper limit": ((), {"delta_limits": (0.0, 0.5)}),
    "reverse": (("D", "initial_state"), {"reverse": True}),
}
forms = pytest.mark.parametrize("name", FORMS)


def drawn(name: str, n: int = 70, batch: tuple[int, ...] = (2,)) -> tuple[dict[str, Array], dict[str, Any]]:
    """(arrays, options) of a form: four heads of five channels, two groups of three states."""
    rng = np.random.default_rng(6)
    more, options = FORMS[name]
    arrays = {"x": rng.standard_normal((*batch, n, 4, 5)), "delta": rng.uniform(0.05, 1, (*batch, n, 4))}
    arrays["A"] = -rng.uniform(0.2, 2, 4)
    arrays["B"], arrays["C"] = rng.standard_normal((2, *batch, n, 2, 3))
    others = {"D": rng.standard_normal(4), "D by channel": rng.standard_normal((4, 5))}
    others |= {"z": rng.standard_normal((*batch, n, 4, 5)), "delta_bias": rng.uniform(-0.1, 0.5, 4)}
    others["initial_state"] = rng.standard_normal((*batch, 4, 5, 3))
    return arrays | {key.partition(" ")[0]: x for key, x in others.items() if key in more}, options


def call(options: dict[str, Any], function: Any = subquad.ssd, **more: Any) -> Any:
    """The operator as a function of arrays by name."""

    def run(given: dict[str, Any]) -> Any:
        by_name = {key: x for key, x in given.items() if key not in POSITIONAL}
        return function(*(given.get(key) for key in POSITIONAL), **by_name, **options, **more)

    return run


@forms
def test_equals_its_definition(library: Library, name: str) -> None:
    if isinstance(library, Jax) and name not in ("gated", "reverse"):
        pytest.skip("compiling two forms is enough")
    arrays, options = drawn(name)
    for dtype in library.dtypes:
        for implementation in ("auto", "generic"):
            y = library.call(call(options, implementation=implementation), arrays, dtype=dtype)
            rounding = library if dtype == "bfloat16" else NumPy()
            expected = definition(rounding.rounded(arrays, dtype), options)
            assert library.dtype_name(y) == dtype
            assert tuple(y.shape) == expected.shape
            if library.has_values:
                assert relative_error(library.numpy(y), expected) <= tolerance(dtype)


@implementations
@pytest.mark.parametrize("name", ["plain", "gated", "reverse"])
def test_equals_the_selective_scan_of_repeated_rates(name: str, implementation: str) -> None:
    arrays, options = drawn(name, 257)
    y, state = call(options, return_state=True, implementation=implementation)(arrays)
    rows = lambda x: x.reshape(*x.shape[:2], 20)  # noqa: E731
    wide = {"u": rows(arrays["x"]), "delta": np.repeat(arrays["delta"], 5, axis=-1), "B": arrays["B"], "C": arrays["C"]}
    wide["A"] = np.broadcast_to(np.repeat(arrays["A"], 5)[:, None], (20, 3))
    D, bias = (np.repeat(arrays[key], 5) if key in arrays else None for key in ("D", "delta_bias"))
    start = arrays["initial_state"].reshape(2, 20, 3) if "initial_state" in arrays else None
    expected, last = subquad.selective_scan(
        *(wide[key] for key in ("u", "delta", "A", "B", "C")), D, z=rows(arrays["z"]) if "z" in arrays else None,
        delta_bias=bias, initial_state=start, return_state=True, **options,
    )  # fmt: skip
    assert relative_error(rows(y), expected) <= 1e-12
    assert relative_error(state.reshape(last.shape), last) <= 1e-12


@implementations
@forms
def test_steps_and_chunks_are_the_whole(name: str, implementation: str) -> None:
    arrays, options = drawn(name, 30)
    if options.get("reverse"):
        pytest.skip("steps go forward")
    full, last = call(options, implementation=implementation, return_state=True)(arrays)
    start, constant = arrays.pop("initial_state", None), ("A", "D", "delta_bias")
    state, carried, outs, parts = start, start, [], []
    for t in range(30):
        token = {key: x if key in constant else x[:, t] for key, x in arrays.items()}
        step = lambda *given, state=state, **rest: subquad.ssd_step(state, *given, **rest)  # noqa: E731
        y, state = call(options, step, implementation=implementation)(token)
        outs.append(y)
    for rows in (slice(0, 13), slice(13, 30)):
        part = {key: x if key in constant else x[:, rows] for key, x in arrays.items()}
        part |= {} if carried is None else {"initial_state": carried}
        y, carried = call(options, implementation=implementation, return_state=True)(part)
        parts.append(y)
    exact = implementation == "auto"
    for got, expected in (
        (np.stack(outs, axis=1), full), (state, last), (np.concatenate(parts, axis=1), full), (carried, last),
    ):  # fmt: skip
        assert np.array_equal(got, expected) if exact else relative_error(got, expected) <= 1e-13


def test_batch_axes_broadcast() -> None:
    """Maps without batch axes serve all items; no batch axis at all."""
    arrays, options = drawn("gated", batch=(3, 2))
    shared = arrays | {"B": arrays["B"][0, 0], "C": arrays["C"][0, :1]}
    wide = shared | {key: np.broadcast_to(shared[key], arrays[key].shape).copy() for key in ("B", "C")}
    y = call(options)(shared)
    assert np.array_equal(y, call(options)(wide))
    one = {key: x if key in ("A", "D", "delta_bias") else x[2, 1] for key, x in wide.items()}
    assert np.array_equal(call(options)(one), y[2, 1])


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


def test_torch_compile_and_func() -> None:
    """One program, forward and backward, also after the sizes have changed; vmap and grad of torch.func."""
    torch = pytest.importorskip("torch")
    functional = torch.func
    run = call(FORMS["limits"][1], return_state=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for n in (30, 41):
        given = {key: torch.from_numpy(x).requires_grad_() for key, x in drawn("limits", n)[0].items()}
        for got, expected in zip(compiled(given), run(given), strict=True):
            assert torch.equal(got, expected)
        losses = [function(given)[0].square().sum() for function in (compiled, run)]
        grads = [torch.autograd.grad(loss, list(given.values())) for loss in losses]
        for got, expected in zip(*grads, strict=True):
            assert relative_error(got.numpy(), expected.numpy()) <= 1e-13
    plain = {key: x.detach() for key, x in given.items()}
    by_func = functional.grad(lambda given: run(given)[0].square().sum())(plain)
    for got, expected in zip(by_func.values(), grads[1], strict=True):
        assert relative_error(got.numpy(), expected.numpy()) <= 1e-12
    axes = {key: 0 if x.ndim > 2 else None for key, x in plain.items()}
    for got, expected in zip(functional.vmap(run, in_dims=(axes,))(plain), run(plain), strict=True):
        assert relative_error(got.numpy(), expected.numpy()) <= 1e-13


def test_jax_vmap_and_grad(jax_library: Jax) -> None:
    import jax

    with jax_library.context("float64"):
        given = {key: jax_library.array(x, "float64") for key, x in drawn("gated", 20)[0].items()}
        run = call(FORMS["gated"][1])
        axes = {key: 0 if x.ndim > 2 else None for key, x in given.items()}
        loss = lambda given: (run(given) ** 2).sum()  # noqa: E731
        each = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(axes,)))(given)
        whole = jax.jit(jax.value_and_grad(loss))(given)
        assert np.allclose(each[0].sum(), whole[0], rtol=1e-12)
        for key, x in whole[1].items():
            own = each[1][key] if axes[key] == 0 else each[1][key].sum(axis=0)
            assert np.allclose(own, x, rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("D", (3,), r"\(4,\) or \(4, 5\)"),
        ("D", (4, 3), r"\(4,\) or \(4, 5\)"),
        ("delta_bias", (4, 5), r"\(4,\): x"),
        ("A", (4, 5), r"\(4,\): x"),
    ],
)
def test_parameters_of_heads_have_a_number_for_each(name: str, shape: tuple[int, ...], expected: str) -> None:
    """D alone may have one for each channel of a head."""
    arrays, options = drawn("gated")
    with pytest.raises(ValueError, match=rf"{name} has shape .*, expected {expected}"):
        call(options)(arrays | {name: np.ones(shape)})
