"""A kernel takes the first override that accepts a call; `explain` tells which, of every call that reaches one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace
from rows.kernels import KERNELS, backend_for, overrides_replaced, watched
from rows.libraries import Jax, NumPy, Strict, Torch

import subquad
from subquad import kernels
from subquad.backend import Accepts, Override
from subquad.core.loading import backend_of
from subquad.kernels.selective_scan import Inputs


def test_the_list_of_kernels_is_closed() -> None:
    """What is declared is what is listed; a backend replaces nothing else."""
    assert kernels.__all__ == sorted(KERNELS)
    assert {name for name, kernel in vars(kernels).items() if isinstance(kernel, type(kernels.linear_scan))} == set(
        KERNELS
    )
    assert all(kernel.name == name for name, kernel in KERNELS.items())


@pytest.mark.parametrize(
    ("library", "names"),
    [(NumPy(), ("compiled", "in-place")), (Torch(), ("compiled", "sdpa")), (Jax(), ("dot_product_attention",))],
    ids=str,
)
def test_attention_of_a_library_has_its_own_implementations(library: Any, names: tuple[str, ...]) -> None:
    found = {x.name for x in backend_for(library).overrides if x.kernel == "softmax_attention"}
    assert found >= set(names)


def test_override_is_what_a_call_reaches() -> None:
    """`explain` does not only say so: the function of the override runs, once a kernel, and by its name alone."""
    torch = pytest.importorskip("torch")
    q = torch.randn(5, 4)
    backend = backend_of(array_namespace(q))
    override = next(x for x in backend.overrides if (x.kernel, x.name) == ("softmax_attention", "sdpa"))
    with watched(backend, override) as calls:
        subquad.attention(q, q, q, "exact")
        assert calls == [{"scale": 0.5, "visible": None, "key_mask": None}]
        subquad.attention(q, q, q, "exact", implementation="generic")
        assert len(calls) == 1
        subquad.attention(q, q, q, "nystrom", num_landmarks=2, landmarks="uniform")
        assert len(calls) == 3
        subquad.explain(subquad.attention, q, q, q, "exact")
        assert len(calls) == 3


def test_the_first_that_accepts_is_taken_and_all_reasons_are_told() -> None:
    """An override is called without the optional keywords that it does not know."""
    reached: list[tuple[str, dict[str, Any]]] = []

    def made(name: str, **accepts: Any) -> Override:
        def run(q: Any, k: Any, v: Any, /, **keywords: Any) -> Any:
            reached.append((name, keywords))
            return kernels.softmax_attention.generic(q, k, v, **keywords)

        return Override("softmax_attention", name, run, Accepts(**accepts))

    q, kernel = np.ones((3, 2)), kernels.softmax_attention
    first = made("first", dtypes=("float32",), needs=("a_package_of_nobody",))
    second = made("second", options=frozenset({"key_mask"}))
    with overrides_replaced(backend_of(array_namespace(q)), "softmax_attention", first, second):
        kernel(q, q, q, scale=1.0, visible=None, key_mask=None)
        assert reached.pop() == ("second", {"scale": 1.0, "key_mask": None})
        said = subquad.explain("attention", q, q, q, "exact", causal=True)
        assert [name for name, _ in said.choices[0].declined] == ["first", "second"]
        reasons = dict(said.declined)
        for word in ("it has no causal form", "float32, not in float64", 'pip install "subquad[a_package_of_nobody]"'):
            assert word in reasons["first"]
        assert reasons["second"] == "it has no causal form"
        with pytest.raises(ValueError, match="implementation 'second' cannot take this call: it has no causal form"):
            subquad.attention(q, q, q, "exact", causal=True, implementation="second")
        with pytest.raises(ValueError, match=r"implementation is 'third'; softmax_attention on numpy has .*'second'"):
            subquad.attention(q, q, q, "exact", implementation="third")
    assert not reached


@pytest.mark.parametrize(("delta", "kept"), [("float16", "float16"), ("float32", "float32")])
def test_half_precision_reaches_the_scan_as_it_is(delta: str, kept: str) -> None:
    """For a kernel that reads it; where the rows differ all are widened, and parameters always."""
    seen: dict[str, str] = {}

    def run(*arrays: Any, **keywords: Any) -> Any:
        seen.update({name: x.dtype.name for name, x in zip(Inputs._fields, arrays, strict=True) if x is not None})
        return kernels.selective_scan.generic(*arrays, **keywords)

    accepts = Accepts(dtypes=("float16", "float32"), one_dtype=False)
    half = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float16)
    A, h = -np.ones((4, 2), np.float16), np.ones((4, 2), np.float16)
    with overrides_replaced(backend_of(np), "selective_scan", Override("selective_scan", "any", run, accepts)):
        y = subquad.selective_scan(
            half, half.astype(delta), A, half[:, :2], half[:, 2:], half[0], z=half, delta_bias=half[1], initial_state=h
        )
    assert y.dtype == np.float16
    rows = {name: seen.pop(name) for name in ("u", "delta", "B", "C", "z")}
    assert set(rows.values()) == {kept}
    assert set(seen.values()) == {"float32"}


def test_explain() -> None:
    strict = Strict()
    q = strict.array(np.ones((5, 4)), "float64")
    plain = subquad.explain(subquad.attention, q, q, q, "exact")
    assert (plain.library, plain.kernel, plain.implementation) == ("array_api_strict", "softmax_attention", "generic")
    assert plain.declined == ()
    assert str(plain) == "softmax_attention on array_api_strict: generic"
    favor = subquad.explain("attention", q, q, q, method="performer", num_features=3, causal=True)
    assert [choice.kernel for choice in favor.choices] == ["feature_step"]
    x = np.ones((5, 4))
    scan = subquad.explain(subquad.selective_scan, x, x, -np.ones((4, 2)), np.ones((5, 2)), np.ones((5, 2)))
    assert (scan.library, scan.kernel) == ("numpy", "selective_scan")
    step = subquad.explain(subquad.selective_scan_step, None, x[0], x[0], -np.ones((4, 2)), np.ones(2), np.ones(2))
    assert step.kernel == "selective_scan"
    assert subquad.explain("linear_scan", x, x).kernel == "linear_scan"


@pytest.mark.parametrize("method", sorted(subquad.METHODS))
def test_explain_checks_as_the_call_does(method: str) -> None:
    q = np.ones((5, 4))
    with pytest.raises(TypeError, match="key_mask has dtype float64"):
        subquad.explain(subquad.attention, q, q, q, method, key_mask=np.ones(5))
    with pytest.raises(TypeError, match="has no option 'nonsense'"):
        subquad.explain(subquad.attention, q, q, q, method, nonsense=1)
    if method in ("linformer", "nystrom"):
        with pytest.raises(NotImplementedError, match="no causal form"):
            subquad.explain(subquad.attention, q, q, q, method, causal=True)


def test_explain_leaves_nothing_behind() -> None:
    """After a failed explanation calls work as before."""
    q = np.ones((5, 4))
    with pytest.raises(ValueError, match="q has 4 channels"):
        subquad.explain(subquad.attention, q, q[:, :3], q, "exact")
    assert subquad.attention(q, q, q, "exact").shape == (5, 4)


@pytest.mark.parametrize("alias", ["performer", "nystromformer"])
def test_aliases_are_the_methods(alias: str) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 70, 4))
    name = {"performer": "favor", "nystromformer": "nystrom"}[alias]
    assert np.array_equal(subquad.attention(q, k, v, alias), subquad.attention(q, k, v, name))


@pytest.mark.parametrize("name", sorted(subquad.METHODS))
def test_name_and_object_are_the_same_method(name: str) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 70, 4))
    assert np.array_equal(subquad.attention(q, k, v, subquad.METHODS[name]()), subquad.attention(q, k, v, name))


x = np.random.default_rng(0).standard_normal((70, 4))
favor, nystrom = subquad.Favor(num_features=3), subquad.Nystrom(num_landmarks=5)
fixed = subquad.Nystrom(landmarks=(x[:5], x[5:10]))
projected = subquad.Linformer(projection=(x.T, x.T))
# what is called, how, and the kernels that it reaches
REACHED: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], list[str]]] = {
    "favor": (subquad.attention, (x, x, x, favor), {}, ["feature_summarize", "feature_attend"]),
    "causal": (favor, (x, x, x), {"causal": True}, ["feature_step"]),
    "causal with keys ahead": (favor, (x[:5], x, x), {"causal": True}, ["feature_summarize", "feature_step"]),
    "linear": ("attention", (x, x, x, "linear"), {}, ["feature_summarize", "feature_attend"]),
    "summarize": (favor.summarize, (x, x), {}, ["feature_summarize"]),
    "attend": (favor.attend, (x, favor.summarize(x, x)), {}, ["feature_attend"]),
    "step": (favor.step, (x, x, x), {}, ["feature_step"]),
    "step goes on": (favor.step, (x, x, x, favor.summarize(x, x)), {}, ["feature_step"]),
    "nystrom": (subquad.attention, (x, x, x, nystrom), {}, ["softmax_attention", "iterative_pinv", "softmax_attention"]),
    "nystrom, ridge": (subquad.Nystrom(num_landmarks=5, pinv="ridge"), (x, x, x), {}, ["softmax_attention"] * 2),
    "nystrom of few rows": (nystrom, (x[:5], x[:5], x[:5]), {}, ["softmax_attention"]),
    "nystrom, ridge-fit": (subquad.Nystrom(num_landmarks=5, landmarks="kmeans", pinv="ridge-fit"), (x, x, x), {}, ["nearest", "softmax_attention"]),
    "linformer": (subquad.attention, (x, x, x, "linformer"), {"rank": 5}, ["softmax_attention"]),
    "linformer attend": (projected.attend, (x, projected.summarize(x, x, columns=2 * (x.T,))), {}, ["softmax_attention"]),
    "nystrom summarize": (fixed.summarize, (x, x), {}, ["feature_summarize"]),
    "nystrom attend": (fixed.attend, (x, fixed.summarize(x, x)), {}, ["iterative_pinv", "softmax_attention"]),
    "scan": ("selective_scan", (x, x, -np.ones((4, 2)), x[:, :2], x[:, :2]), {}, ["selective_scan"]),
    "scan step": (subquad.selective_scan_step, (None, x[0], x[0], -np.ones((4, 2)), x[0, :2], x[0, :2]), {}, ["selective_scan"]),
    "linear scan": (subquad.linear_scan, (x, x), {"return_state": True}, ["linear_scan"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REACHED)
def test_explain_tells_every_kernel_that_a_call_reaches(case: str) -> None:
    function, args, keywords, expected = REACHED[case]
    with overrides_of_none():
        explained = subquad.explain(function, *args, **keywords)
    assert [choice.kernel for choice in explained.choices] == list(dict.fromkeys(expected))
    assert {choice.implementation for choice in explained.choices} == {"generic"}
    assert str(explained) == "\n".join(f"{name} on numpy: generic" for name in dict.fromkeys(expected))


@contextlib.contextmanager
def overrides_of_none() -> Iterator[None]:
    """NumPy without overrides: then a kernel that is reached twice is told once."""
    with contextlib.ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(overrides_replaced(backend_of(np), kernel))
        yield


def test_explain_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the generic form of a kernel: arrays of the declared shapes stand for its outputs."""

    def fail(*_: Any, **__: Any) -> Any:
        pytest.fail("a kernel ran")

    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "generic", fail)
    with overrides_of_none():
        for function, args, keywords, _ in REACHED.values():
            subquad.explain(function, *args, **keywords)


@pytest.mark.parametrize("library", [Torch(), Jax(), Strict()], ids=str)
def test_explain_elsewhere(library: Any) -> None:
    """`explain` asks the library of the arrays, of streaming calls too."""
    q = library.array(x, "float32")
    for call, args in ((favor.step, (q, q, q)), (favor.summarize, (q, q)), (favor, (q, q, q))):
        explained = subquad.explain(call, *args)
        assert explained.library == {"strict": "array_api_strict"}.get(str(library), str(library))
        assert explained.choices
        assert all(str(choice.kernel) in str(explained) for choice in explained.choices)


NO_SUCH_CALL = {
    "exact step": lambda: subquad.Exact().step(x, x, x),
    "exact summarize": lambda: subquad.Exact().summarize(x, x),
    "exact attend": lambda: subquad.Exact().attend(x, {}),
    "exact merge": lambda: subquad.Exact().merge(None, None),
    "nystrom step": lambda: fixed.step(x, x, x),
    "linformer step": lambda: projected.step(x, x, x),
}


@pytest.mark.parametrize("case", NO_SUCH_CALL)
def test_a_call_that_a_method_does_not_have_says_so(case: str) -> None:
    method, name = case.split()
    with pytest.raises(NotImplementedError, match=rf"^{method.capitalize()} has no {name}: ") as caught:
        NO_SUCH_CALL[case]()
    assert len(str(caught.value)) > 50  # and why


def test_explain_of_a_call_that_there_is_not_says_what_the_call_says() -> None:
    with pytest.raises(NotImplementedError, match="Exact has no step"):
        subquad.explain(subquad.Exact().step, x, x, x)
    for function in (favor.merge, np.sum, "favour", 3):
        with pytest.raises(ValueError, match="Known: attention"):
            subquad.explain(function, x)
