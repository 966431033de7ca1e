"""Every override of every backend keeps its declaration: the cases are made from what overrides accept."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from rows.kernels import (
    EXAMPLES,
    HALVES,
    KERNELS,
    OVERRIDES,
    Example,
    as_tuple,
    backend_for,
    choice_of,
    observed,
    watched,
)
from rows.libraries import Jax, Library, NumPy, Torch, relative_error, tolerance

from subquad.backend import Call, Conditions, Override
from subquad.core.override import UNLESS_UNDER

FLOATS = (*HALVES, "float32", "float64")
REAL = {"complex64": "float32", "complex128": "float64"}


every_override = pytest.mark.parametrize(("library", "override"), OVERRIDES)


def per_dtype() -> Iterator[Any]:
    for param in OVERRIDES:
        for dtype in param.values[1].accepts.dtypes:
            yield pytest.param(*param.values, dtype, id=f"{param.id}-{dtype}", marks=param.marks)


def subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    names = sorted(names)
    return [some for count in range(len(names) + 1) for some in itertools.combinations(names, count)]


def examples(override: Override, dtype: str) -> list[Example]:
    """The examples that have arrays of this dtype: complex arrays for a complex dtype, else real arrays."""
    found = [x for x in EXAMPLES[override.kernel] if x.is_complex == (dtype in REAL)]
    assert found, f"tests/rows/kernels.py has no example of {override.kernel} in {dtype}"
    return found


def need_installed(library: Library, override: Override) -> None:
    for package in override.accepts.needs:
        if backend_for(library).why_missing(package) is not None:
            pytest.skip(f"{package} is not installed")


NUMPY = NumPy()


@functools.cache
def reference(example: Example, chosen: tuple[str, ...], library: Library, dtype: str) -> tuple[np.ndarray, ...]:
    """The generic form of the inputs as the library rounds them, in float64."""
    arrays, keywords = example.given(library, dtype, chosen)
    arrays = [None if x is None else library.numpy(x) for x in arrays]
    if dtype in HALVES:
        arrays = [x.astype(np.float64) if x is not None and x.dtype.kind not in "biu" else x for x in arrays]
    if "key_mask" in keywords:
        keywords["key_mask"] = example.options["key_mask"]
    return as_tuple(KERNELS[example.kernel].generic(*arrays, **keywords))


def test_every_kernel_has_examples_with_all_its_options() -> None:
    for name, kernel in KERNELS.items():
        assert EXAMPLES[name]
        assert all(set(example.options) == set(kernel.options) for example in EXAMPLES[name])


@pytest.mark.parametrize(("library", "override", "dtype"), list(per_dtype()))
def test_runs_equals_generic_and_gives_what_the_kernel_declares(
    library: Library, override: Override, dtype: str
) -> None:
    """With every choice of its options it takes some example; what it does not take it declines with a reason."""
    need_installed(library, override)
    kernel, real = KERNELS[override.kernel], REAL.get(dtype, dtype)
    with library.context(real), watched(backend_for(library), override) as calls:
        for chosen in subsets(override.accepts.options):
            calls.clear()
            for example in examples(override, dtype):
                arrays, keywords = example.given(library, real, chosen)
                choice, reached = choice_of(kernel, arrays, keywords), len(calls)
                if choice.implementation != override.name:
                    assert choice.implementation == "generic"
                    assert dict(choice.declined)[override.name]
                    with pytest.raises(ValueError, match=r"cannot take this call: .*Use 'auto' or 'generic'"):
                        kernel(*arrays, implementation=override.name, **keywords)
                    continue
                got = as_tuple(kernel(*arrays, **keywords))
                assert len(calls) == reached + 1, "the choice was another than explained"
                declared = kernel.outputs(*arrays, **keywords)
                for x, like in zip(got, declared, strict=True):
                    assert tuple(x.shape) == tuple(like.shape)
                    # what is stored in half precision is computed in float32, and may stay so
                    assert x.dtype == like.dtype or (dtype in HALVES and library.dtype_name(x) == "float32")
                for x, expected in zip(
                    got, reference(example, chosen, library if real in HALVES else NUMPY, real), strict=True
                ):
                    check_close(library.numpy(x), expected, real)
            assert calls, f"no example of {override.kernel} is taken with options {chosen}"
            assert all(set(override.accepts.options) >= set(kernel.options) & set(keywords) for keywords in calls)


def check_close(got: np.ndarray, expected: np.ndarray, dtype: str, room: float = 1) -> None:
    """Equal to rounding; a shift is −∞ where it must be."""
    finite = np.isfinite(expected)
    assert got.shape == expected.shape
    assert np.array_equal(got[~finite], expected[~finite], equal_nan=True)
    assert relative_error(got[finite], expected[finite]) <= room * tolerance(dtype)


@every_override
def test_declines_what_it_does_not_accept(
    library: Library, override: Override, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign option, dtype, device or condition, or a package that is missing: each is a reason of its own."""
    backend, accepts, kernel = backend_for(library), override.accepts, KERNELS[override.kernel]
    monkeypatch.setattr(backend, "why_missing", lambda package, load=True: None)
    dtype = next(name for name in accepts.dtypes if name in FLOATS)
    example = examples(override, dtype)[0]
    arrays, _ = example.given(library, dtype)

    def reasons(arrays: Iterable[Any] = arrays, conditions: Conditions = Conditions(), **options: Any) -> list[str]:  # noqa: B008
        static = {**kernel.options, **example.static, **options}
        key_mask = static.pop("key_mask", None)
        call = Call(override.kernel, tuple(arrays), key_mask, static, conditions)
        return accepts.why_not(call, backend, kernel.options)

    for name in set(kernel.options) - accepts.options:
        _, keywords = example.given(library, dtype, [name])
        assert any(name in x or str(keywords[name]) in x for x in reasons(**keywords)), name
        with watched(backend, override) as calls:
            assert choice_of(kernel, arrays, keywords).implementation == "generic"
            kernel(*arrays, **keywords)
            assert not calls
    for foreign in set(library.known_dtypes) - set(accepts.dtypes):
        other, _ = example.given(library, foreign)
        assert any(foreign in x for x in reasons(other)), foreign
    if accepts.one_dtype and len(arrays) > 1 and {"float32", "float64"} <= set(accepts.dtypes):
        first, *rest = (library.array(np.ones((2, 2)), name) for name in ("float32", "float64"))
        assert any("one dtype" in x for x in reasons([first, *rest]))
    for condition, reason in UNLESS_UNDER.items():
        assert (reason in reasons(conditions=Conditions(**{condition: True}))) == (condition not in accepts.under)
    for package in accepts.needs:
        monkeypatch.setattr(
            backend,
            "why_missing",
            lambda name, load=True, missing=package: f"{name} is not installed" if name == missing else None,
        )
        assert any(f"{package} is not installed" in x for x in reasons())
    monkeypatch.setattr(backend, "why_missing", lambda package, load=True: None)
    monkeypatch.setattr(backend, "device_kind", lambda array: "elsewhere")
    assert any("the arrays are on elsewhere" in x for x in reasons())


# of a gradient: sums of sums
GRADIENT_ROOM = 4


@functools.cache
def reference_gradients(example: Example, chosen: tuple[str, ...], dtype: str) -> list[np.ndarray]:
    """Gradients by PyTorch of the generic form in float64, for inputs rounded to `dtype`."""
    pytest.importorskip("torch")
    wide = dataclasses.replace(example, draw=lambda: rounded(example, dtype))
    return torch_gradients(Torch(), KERNELS[example.kernel].generic, wide, chosen, "float64")


def rounded(example: Example, dtype: str) -> Any:
    return tuple(NUMPY.rounded(list(example.arrays), dtype))


def loss_of(example: Example, function: Any, arrays: list[Any], keywords: dict[str, Any], library: Library) -> Any:
    """A real loss in which every number that the outputs tell counts differently."""
    outputs = observed(example.kernel, as_tuple(function(*arrays, **keywords)))
    total: Any = 0.0 if outputs else (0 * arrays[0]).sum()  # where all outputs are integers
    for i, x in enumerate(outputs):
        name = library.dtype_name(x)
        weight = library.array(np.random.default_rng(i).standard_normal(x.shape), REAL.get(name, name))
        total = total + (x * weight).sum() if name not in REAL else total + ((x.real + x.imag / 2) * weight).sum()
    return total


def is_differentiable(library: Library, x: Any) -> bool:
    return "float" in library.dtype_name(x) or "complex" in library.dtype_name(x)


def torch_gradients(
    library: Library, function: Any, example: Example, chosen: tuple[str, ...], dtype: str
) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    arrays, keywords = example.given(library, dtype, chosen)
    leaves = [x.requires_grad_() for x in arrays if x is not None and is_differentiable(library, x)]
    loss = loss_of(example, function, arrays, keywords, library)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [np.zeros(leaf.shape) if x is None else x.resolve_conj().cpu().numpy()
            for leaf, x in zip(leaves, found, strict=True)]  # fmt: skip


def jax_gradients(
    library: Library, function: Any, example: Example, chosen: tuple[str, ...], dtype: str
) -> list[np.ndarray]:
    """Gradients by JAX under `jit`, conjugated, since JAX's gradient by a complex number is the conjugate."""
    import jax

    arrays, keywords = example.given(library, dtype, chosen)
    places = [i for i, x in enumerate(arrays) if x is not None and is_differentiable(library, x)]

    def loss(*given: Any) -> Any:
        mine = list(arrays)
        for i, x in zip(places, given, strict=True):
            mine[i] = x
        return loss_of(example, function, mine, keywords, library)

    gradient = jax.jit(jax.grad(loss, argnums=tuple(range(len(places)))))
    return [np.conj(np.asarray(x)) for x in gradient(*(arrays[i] for i in places))]


DIFFERENTIABLE = [param for param in OVERRIDES if isinstance(param.values[0], Torch | Jax)]


@pytest.mark.parametrize(("library", "override"), DIFFERENTIABLE)
def test_gradients_equal_those_of_the_generic_form(library: Library, override: Override) -> None:
    """Through the override where it takes calls whose gradients are recorded, which it says; else generic."""
    need_installed(library, override)
    pytest.importorskip("torch")
    kernel, accepts = KERNELS[override.kernel], override.accepts
    gradients = jax_gradients if isinstance(library, Jax) else torch_gradients
    survives = ("tracing" if isinstance(library, Jax) else "recorded") in accepts.under
    real = "float64" if "float64" in accepts.dtypes else "float32"
    some = [
        x for x in EXAMPLES[override.kernel] if not x.is_complex or {"complex64", "complex128"} & set(accepts.dtypes)
    ]
    if override.kernel == "clustered_attention" and isinstance(library, Jax):
        some = some[:2]  # no gradient is compiled, and JAX's own of the generic form takes a minute for an example
    with library.context(real), watched(backend_for(library), override) as calls:
        for chosen in subsets(accepts.options):
            calls.clear()
            for example in some:
                found = gradients(library, kernel, example, chosen, real)
                expected = reference_gradients(example, chosen, real)
                largest = max(float(np.abs(x).max(initial=0)) for x in expected)  # some are 0 by right
                for got, want in zip(found, expected, strict=True):
                    assert got.shape == want.shape
                    limit = GRADIENT_ROOM * tolerance(real) * max(float(np.abs(want).max(initial=0)), largest / 100)
                    assert np.abs(got - want).max(initial=0) <= limit
            assert bool(calls) == survives
