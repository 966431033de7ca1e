"""Nothing is imported before its array arrives, imports point one way, overrides run and equal the generic form."""

from __future__ import annotations

import ast
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace
from interpreter import python
from rows.libraries import LIBRARIES, Jax, Library, NumPy, Strict, Torch, TorchMeta, relative_error, tolerance
from rows.methods import CASES, Case
from rows.scans import Scan, scans

import subquad
from subquad import kernels
from subquad._dispatch import Override, backend_of
from subquad.kernels.selective_scan import Inputs

PACKAGE = Path(subquad.__file__).parent
FRAMEWORKS = ("torch", "jax", "jaxlib", "cupy", "numba", "dask", "tensorflow")


def test_import_loads_no_framework_and_starts_no_thread() -> None:
    code = f"""
import sys, threading, subquad
print([name for name in {FRAMEWORKS!r} + ("matplotlib", "rich") if name in sys.modules], threading.active_count(),
      [name for name in sys.modules if name.startswith("subquad_")])
"""
    assert python(code) == "[] 1 []"


def test_numpy_arrays_load_no_other_framework() -> None:
    """A call on NumPy arrays may load Numba, and nothing of the other libraries."""
    code = """
import sys, numpy, subquad
q = numpy.ones((2, 5, 4))
for method in subquad.METHODS: subquad.attention(q, q, q, method)
subquad.selective_scan(q, q, -numpy.ones((4, 2)), q[..., :2], q[..., :2])
subquad.linear_scan(q, q)
names = ["torch", "jax", "cupy"]
print([name for name in names + ["subquad_" + name for name in names] if name in sys.modules])
"""
    assert python(code) == "[]"


THIRD_PARTY = """
from subquad._dispatch import Override
calls = []
def run(q, k, v, /, *, scale, causal=False, key_mask=None):
    calls.append(scale)
    return q * 0 + 7
def declines(q, k, v, /, *, scale, causal=False, key_mask=None):
    return "it cannot look back" if causal else None
KERNELS = {"softmax_attention": (Override("seven", run, declines),)}
"""
USE = """
import array_api_strict as xp, subquad
q = xp.ones((5, 4))
chosen, out = subquad.explain("attention", q, q, q, "exact").implementation, subquad.attention(q, q, q, "exact")
print(chosen, float(out[0, 0]))
print(subquad.explain(subquad.attention, q, q, q, "exact", causal=True))
"""
EXPECTED = "seven 7.0\nsoftmax_attention on array_api_strict: generic\n  seven declined: it cannot look back"


def test_backend_of_a_third_party_by_name(tmp_path: Path) -> None:
    """A package `subquad_<library>` on the path is a backend."""
    pytest.importorskip("array_api_strict")
    (tmp_path / "subquad_array_api_strict").mkdir()
    (tmp_path / "subquad_array_api_strict" / "__init__.py").write_text(THIRD_PARTY, encoding="utf-8")
    assert python(USE, tmp_path) == EXPECTED


def test_backend_of_a_third_party_by_entry_point(tmp_path: Path) -> None:
    """Any module is a backend if its distribution has the entry point, whatever its name."""
    pytest.importorskip("array_api_strict")
    (tmp_path / "someone_elses.py").write_text(THIRD_PARTY, encoding="utf-8")
    information = tmp_path / "someone_elses-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: someone_elses\nVersion: 1.0\n", encoding="utf-8"
    )
    (information / "entry_points.txt").write_text(
        "[subquad.backends]\narray_api_strict = someone_elses\n", encoding="utf-8"
    )
    assert python(USE, tmp_path) == EXPECTED


# imports point from later rooms to earlier ones; names of one room may know each other
ROOMS = [
    {"_dispatch", "_arrays", "_blocks", "_backends", "_draw"},
    {"kernels"},
    {"attention", "ssm"},
    {"explain"},
    {"__init__"},
    {"cli", "__main__"},
]


def imported(tree: ast.AST) -> list[str]:
    """Names of all modules that a file imports, also inside functions; relative ones begin with a dot."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def modules(root: Path) -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(root.rglob("*.py"))]


def room_of(name: str) -> int:
    return next(i for i, room in enumerate(ROOMS) if name in room)


def test_imports_point_one_way() -> None:
    for path, tree in modules(PACKAGE):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(tree):
            parts = name.split(".")
            assert parts[0], f"{path} imports {name}: in this package imports are absolute"
            if parts[0] != "subquad":
                continue
            there = parts[1] if len(parts) > 1 and any(parts[1] in room for room in ROOMS) else "__init__"
            assert room_of(there) <= room_of(here), f"{path} imports {name}"
            if room_of(there) == room_of(here) == 2:
                assert there == here, f"{path} imports {name}: attention and ssm do not know each other"


def code_strings(tree: ast.AST) -> list[str]:
    """String constants that are not docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    return [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
    ]


def test_no_framework_is_named_in_the_algorithms() -> None:
    """In `subquad/`: not imported, not asked for by name, not even in a message."""
    for path, tree in modules(PACKAGE):
        for name in imported(tree):
            assert name.split(".")[0] not in FRAMEWORKS, path
        for text in code_strings(tree):
            assert not any(framework in text.lower() for framework in FRAMEWORKS), f"{path}: {text!r}"


ENGINES = ("subquad_numpy", "subquad_cupy")  # whose compiled kernels other libraries share


def test_backends_know_their_own_library_and_the_lower_rooms() -> None:
    """A backend may use the kernels of an engine, and names no other library."""
    backends = Path(sys.modules["subquad._dispatch"].__file__ or "").parents[1] / "backends"
    if not backends.is_dir():
        pytest.skip("installed without its source tree")
    others = {"torch", "jax", "cupy"}
    for path, tree in modules(backends):
        own = path.relative_to(backends).parts[0].removeprefix("subquad_")
        for name in imported(tree):
            first, *rest = name.split(".")
            assert first not in others - {own}, f"{path} imports {name}"
            assert not (first.startswith("subquad_") and first not in (f"subquad_{own}", *ENGINES)), f"{path}: {name}"
            if first == "subquad":
                assert rest, f"{path} imports all of subquad"
                assert rest[0] in ROOMS[0] | ROOMS[1], f"{path} imports {name}"


def overrides(kernel: str) -> list[Any]:
    """(library, override) for every override of a kernel that an installed library has."""
    found = []
    for param in LIBRARIES:
        library = param.values[0]
        if type(library) not in (NumPy, Torch, Jax):
            continue
        try:
            x = library.array(np.zeros((2, 2)), "float32")
        except pytest.skip.Exception:
            continue
        found += [pytest.param(library, override.name, id=f"{library}-{override.name}")
                  for override in backend_of(array_namespace(x)).kernels.get(kernel, ())]  # fmt: skip
    return found


ATTENTION_OVERRIDES, SCAN_OVERRIDES, LINEAR_SCAN_OVERRIDES, FEATURE_OVERRIDES, PINV_OVERRIDES = map(
    overrides, ("softmax_attention", "selective_scan", "linear_scan", "feature_product", "iterative_pinv")
)


def test_the_list_of_kernels_is_closed() -> None:
    """Each has its test of overrides below; a backend replaces nothing else."""
    scans_and_products = {"selective_scan", "linear_scan", "feature_product"}
    assert set(kernels.__all__) == {"softmax_attention", "iterative_pinv"} | scans_and_products
    for library in (Library(), Torch(), Jax()):
        try:
            backend = backend_of(array_namespace(library.array(np.zeros(1), "float32")))
        except pytest.skip.Exception:
            continue
        assert set(backend.kernels) <= set(kernels.__all__)
    names = {param.id for param in ATTENTION_OVERRIDES}
    assert {"torch-sdpa", "jax-dot_product_attention"} & names or not names


FEW = {
    "few keys": Case((2, 600, 8), (1, 40, 8), (1, 40, 3), mask="random"),
    "few queries": Case((2, 40, 8), (1, 600, 8), (1, 600, 3), mask="random"),
}


@pytest.mark.parametrize("case", ["n=63", "n<n_kv", "n>n_kv", "grouped", "grouped-masks", "shared", *FEW])
@pytest.mark.parametrize(("library", "name"), ATTENTION_OVERRIDES)
def test_attention_override_runs_and_equals_generic(
    library: Library, name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by name; where it declines it says why, and "auto" takes the generic form."""
    shapes = (CASES | FEW)[case]
    if isinstance(library, Jax):  # it wants d_v = d
        shapes = dataclasses.replace(shapes, v=(*shapes.v[:-1], shapes.k[-1]))
    drawn = shapes.draw()
    ran = 0
    with library.context("float32"):
        given = library.arrays(list(drawn.values()), "float32")
        leave_only(monkeypatch, backend_of(array_namespace(given[0])), "softmax_attention", name)
        for causal in (False, True):

            def attend(*x: Any, implementation: str, causal: bool = causal) -> Any:
                *qkv, mask = x
                return subquad.attention(*qkv, "exact", causal=causal, key_mask=mask, implementation=implementation)

            *qkv, mask = given
            explanation = subquad.explain(subquad.attention, *qkv, "exact", causal=causal, key_mask=mask)
            if explanation.implementation != name:
                assert explanation.implementation == "generic"
                assert name in dict(explanation.declined)
                with pytest.raises(ValueError, match=f"{name}.* cannot take this call: .*Use 'auto' or 'generic'"):
                    attend(*given, implementation=name)
                continue
            ran += 1
            fast, generic = (library.numpy(attend(*given, implementation=choice)) for choice in (name, "generic"))
            assert relative_error(fast, generic) <= tolerance("float32")
    assert ran or (isinstance(library, Torch) and name == "numba" and case not in FEW)


@pytest.mark.parametrize("options", [{}, {"num_features": 12, "center": True}, {"features": "hyperbolic"}])
@pytest.mark.parametrize("n", [63, 2100])
@pytest.mark.parametrize(("library", "name"), FEATURE_OVERRIDES)
def test_feature_override_runs_and_equals_generic(
    library: Library, name: str, n: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Favor has no choice of implementation: the generic form is what runs when the override is taken away."""
    case = Case((2, n, 8), (1, n, 8), (1, n, 3), mask="random")
    with library.context("float32"):
        q, k, v, mask = library.arrays(list(case.draw().values()), "float32")
        backend = backend_of(array_namespace(q))
        leave_only(monkeypatch, backend, "feature_product", name)
        explanation = subquad.explain(subquad.attention, q, k, v, "favor", key_mask=mask, **options)
        assert explanation.implementation == (name if name == "numba" or "center" not in options else "generic")
        fast = subquad.attention(q, k, v, "favor", key_mask=mask, **options)
        leave_only(monkeypatch, backend, "feature_product", None)
        assert subquad.explain(subquad.attention, q, k, v, "favor").implementation == "generic"
        generic = subquad.attention(q, k, v, "favor", key_mask=mask, **options)
    assert relative_error(library.numpy(fast), library.numpy(generic)) <= tolerance("float32")


# below, at and beyond vectors and panels; batch axes, one of them empty
STOCHASTIC = [(1, 1), (3, 7, 7), (2, 2, 16, 16), (33, 33), (3, 64, 64), (2, 100, 100), (256, 256), (0, 4, 4)]


def draw_stochastic(*shape: int) -> np.ndarray:
    """Matrices as Nyström attention has them: rows are positive and add up to 1."""
    weights = np.exp(np.random.default_rng(0).standard_normal(shape))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", STOCHASTIC)
@pytest.mark.parametrize(("library", "name"), PINV_OVERRIDES)
def test_pinv_override_equals_generic(library: Library, name: str, shape: tuple[int, ...], dtype: str) -> None:
    with library.context(dtype):
        a = library.array(draw_stochastic(*shape), dtype)
        fast, generic = (
            library.numpy(kernels.iterative_pinv(a, iterations=6, implementation=choice))
            for choice in (name, "generic")
        )
    assert fast.shape == generic.shape == shape
    assert fast.dtype == generic.dtype
    assert relative_error(fast, generic) <= tolerance(dtype)


@pytest.mark.parametrize(("library", "name"), PINV_OVERRIDES)
def test_pinv_override_of_any_scale_and_strides(library: Library, name: str) -> None:
    """‖A‖₁ is not ‖A‖_∞ where A is no weights; a matrix of zeros is its own pseudo-inverse and spoils no other."""
    host = draw_stochastic(4, 5, 5) * np.asarray([0.0, 1e-4, -3.0, 1e4])[:, None, None] * np.arange(1, 6)
    with library.context("float64"):
        a = library.array(host, "float64").mT
        call = kernels.iterative_pinv
        fast, generic = (library.numpy(call(a, iterations=30, implementation=x)) for x in (name, "generic"))
    # each of 30 steps rounds, and a rounding grows by the condition number in A Z and once more in Z
    tolerance = 30 * np.finfo(float).eps * np.linalg.cond(host[1:]).max() ** 2
    assert np.abs(fast[1:] @ np.matrix_transpose(host)[1:] - np.eye(5)).max() <= tolerance
    assert not fast[0].any()
    for got, expected in zip(fast[1:], generic[1:], strict=True):
        assert relative_error(got, expected) <= tolerance


@pytest.mark.parametrize(("library", "name"), PINV_OVERRIDES)
def test_pinv_override_leaves_large_matrices(library: Library, name: str) -> None:
    a = library.array(draw_stochastic(257, 257), "float32")
    with pytest.raises(ValueError, match=f"{name}.* cannot take this call: .*cache"):
        kernels.iterative_pinv(a, iterations=1, implementation=name)


def test_pinv_override_leaves_gradients_to_the_generic_form() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("numba")
    a = torch.asarray(draw_stochastic(8, 8) * np.arange(8, 16)).requires_grad_()  # the largest sums are unique
    with pytest.raises(ValueError, match="gradients are recorded through the generic form"):
        kernels.iterative_pinv(a, iterations=6, implementation="numba")
    assert torch.autograd.gradcheck(lambda a: kernels.iterative_pinv(a, iterations=6), [a])
    with torch.no_grad():
        assert not kernels.iterative_pinv(a, iterations=6, implementation="numba").requires_grad


@pytest.mark.parametrize("center", [False, True])
def test_compiled_product_leaves_recorders_the_generic_form(center: bool) -> None:
    """A graph of operations or a count of them would miss what happens outside torch."""
    torch = pytest.importorskip("torch")
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    def favor(q: Any, k: Any, v: Any) -> Any:
        return subquad.attention(q, k, v, "favor", num_features=12, center=center)

    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(3, 2, 20, 8, generator=draw).unbind() for _ in range(2))
    traced = make_fx(favor)(*first)
    torch.testing.assert_close(traced(*second), favor(*second))
    with FlopCounterMode(display=False) as counter:
        favor(*first)
    assert counter.get_total_flops() > 0


def test_compiled_attention_takes_one_dtype() -> None:
    """The door casts; a kernel called by itself is not at its mercy."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 600, 8))
    expected = kernels.softmax_attention(q, k, v, scale=0.3)
    for single in range(3):
        mixed = [x.astype(np.float32) if i == single else x for i, x in enumerate((q, k, v))]
        assert relative_error(kernels.softmax_attention(*mixed, scale=0.3), expected) <= tolerance("float32")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("library", "name"), ATTENTION_OVERRIDES)
def test_attention_override_on_many_keys(library: Library, name: str, masked: bool) -> None:
    """Longer than any block."""
    case = Case((2, 100, 8), (2, 2100, 8), (2, 2100, 8), mask="random")
    with library.context("float32"):
        q, k, v, mask = library.arrays(list(case.draw().values()), "float32")
        fast, generic = (
            subquad.attention(q, k, v, "exact", key_mask=mask if masked else None, implementation=choice)
            for choice in (name, "generic")
        )
    assert relative_error(library.numpy(fast), library.numpy(generic)) <= tolerance("float32")


def leave_only(monkeypatch: pytest.MonkeyPatch, backend: Any, kernel: str, name: str | None) -> None:
    """Take away the other overrides of a kernel, which would be asked first."""
    left = tuple(override for override in backend.kernels[kernel] if override.name == name)
    replace_kernels(monkeypatch, backend, {**backend.kernels, kernel: left})


def replace_kernels(monkeypatch: pytest.MonkeyPatch, backend: Any, kernels: dict[str, Any]) -> None:
    """Other overrides for a backend, which is frozen, until the test ends."""
    monkeypatch.setitem(vars(backend), "kernels", kernels)


@pytest.mark.parametrize(
    ("library", "causal", "queries", "masked"), [(TorchMeta(), True, 64, True), (Jax(), False, 1, False)], ids=str
)
def test_memory_of_all_items_counts(library: Library, causal: bool, queries: int, masked: bool) -> None:
    """What one item may hold, 64 may not: the mask's of torch, the logits' of JAX, whichever array brings them in."""
    mask = np.ones((64, 2048), dtype=bool) if masked else None
    for batch, taken in ((1, True), (64, False)):
        q, k = (library.array(np.zeros((min(n, batch), 2048, 4)), "float32") for n in (queries, 64))
        key_mask = None if mask is None else library.array(mask[:batch], "float32")
        explanation = subquad.explain(subquad.attention, q, k, k, "exact", causal=causal, key_mask=key_mask)
        assert (explanation.implementation != "generic") is taken, explanation


@pytest.mark.parametrize("form", ["plain", "causal", "mask"])
def test_memory_of_torch_attention_grows_no_faster_than_n(form: str) -> None:
    """A mask of the keys is not spread over the queries; without one nothing is copied."""
    torch = pytest.importorskip("torch")
    from subquad_torch.bench import peak_extra_memory

    def attend(q: Any, k: Any, v: Any) -> Any:
        mask = torch.arange(len(k)) < len(k) - 9 if form == "mask" else None
        return subquad.attention(q, k, v, "exact", causal=form == "causal", key_mask=mask, implementation="sdpa")

    peaks = [peak_extra_memory(attend, *torch.zeros(3, n, 64)) for n in (2048, 8192)]
    assert peaks[1] < 5 * peaks[0]
    copies = 2 if form == "mask" else 0  # of k and v, with zeros for what is hidden
    assert peaks[1] - peaks[0] <= (copies + 1) * (8192 - 2048) * 64 * 4


def test_jax_override_runs(jax_library: Jax) -> None:
    """It wants d_v = d, which the table of cases avoids."""
    q, k, v = (jax_library.array(x, "float32") for x in np.random.default_rng(0).standard_normal((3, 2, 9, 4)))
    mask = jax_library.array(np.arange(9) % 3 > 0, "float32")
    explanation = subquad.explain("attention", q, k, v, method="exact", key_mask=mask)
    assert explanation.implementation == "dot_product_attention"
    fast, generic = (subquad.attention(q, k, v, "exact", key_mask=mask, implementation=choice)
                     for choice in ("dot_product_attention", "generic"))  # fmt: skip
    assert relative_error(np.asarray(fast), np.asarray(generic)) <= tolerance("float32")


def test_jax_override_leaves_doubles_to_the_generic_form(jax_library: Jax) -> None:
    """It takes its softmax in float32, where logits overflow that a double holds."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 9, 4))
    expected = subquad.attention(1e20 * q, 1e20 * k, v, "exact")
    with jax_library.context("float64"):
        q, k, v = (jax_library.array(x, "float64") for x in (1e20 * q, 1e20 * k, v))
        declined = subquad.explain("attention", q, k, v, method="exact").declined
        assert [name for name, reason in declined if "float32" in reason] == ["dot_product_attention"]
        got = np.asarray(subquad.attention(q, k, v, "exact"))
    assert relative_error(got, expected) <= tolerance("float64")


def test_jax_override_leaves_an_empty_mask_to_the_generic_form(jax_library: Jax) -> None:
    """Its batch axes broadcast with those of q, k and v."""
    q = jax_library.array(np.ones((1, 9, 4)), "float32")
    out = subquad.attention(q, q, q, "exact", key_mask=jax_library.array(np.ones((0, 9), bool), "float32"))
    assert out.shape == (0, 9, 4)


@scans("gated", "groups", "complex", "reverse", "constant")
@pytest.mark.parametrize(("library", "name"), SCAN_OVERRIDES)
def test_scan_override_runs_and_equals_generic(library: Library, name: str, scan: Scan) -> None:
    with library.context("float32"):
        given = library.arrays(scan.draw(63), "float32")
        explained = subquad.explain(
            subquad.selective_scan,
            *(given.get(key) for key in ("u", "delta", "A", "B", "C", "D")),
            **{key: given.get(key) for key in ("z", "delta_bias", "initial_state")},
            delta_softplus=scan.softplus,
            reverse=scan.reverse,
        )
        if explained.implementation != name:
            declined = dict(explained.declined)
            assert name in declined or explained.implementation != "generic"
            pytest.skip(f"{name} declined: {declined.get(name, explained.implementation + ' comes first')}")
        for fast, generic in zip(
            *(scan.call(implementation=choice)(given) for choice in (name, "generic")), strict=True
        ):
            assert relative_error(library.numpy(fast), library.numpy(generic)) <= tolerance("float32")


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("library", "name"), LINEAR_SCAN_OVERRIDES)
def test_linear_scan_override_runs_and_equals_generic(
    library: Library, name: str, reverse: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    turn = np.exp(1j * rng.uniform(-3, 3, (2, 63, 5))) if dtype == "complex64" else 1
    a, b, state = rng.uniform(-1, 1, (2, 63, 5)) * turn, rng.standard_normal((2, 63, 5)) * turn, np.ones((2, 5))
    with library.context("float32"):
        a, b, state = library.arrays((a, b, state), "float32")
        explained = subquad.explain(subquad.linear_scan, a, b, initial_state=state, reverse=reverse)
        if explained.implementation != name:
            assert name in dict(explained.declined)
            pytest.skip(f"{name} declined: {dict(explained.declined)[name]}")
        backend, called = backend_of(array_namespace(a)), []
        override = next(o for o in backend.kernels["linear_scan"] if o.name == name)

        def run(*args: Any, **kwargs: Any) -> Any:
            called.append(kwargs)
            return override.run(*args, **kwargs)

        watched = (Override(name, run, override.declines),)
        replace_kernels(monkeypatch, backend, {**backend.kernels, "linear_scan": watched})
        fast, generic = (
            subquad.linear_scan(a, b, initial_state=state, reverse=reverse, implementation=choice)
            for choice in ("auto", "generic")
        )
        assert called == [{"reverse": reverse}]
        assert relative_error(library.numpy(fast), library.numpy(generic)) <= tolerance("float32")


def test_override_is_what_a_call_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """`explain` does not only say so: the function of the override runs."""
    torch = pytest.importorskip("torch")
    q, called = torch.randn(5, 4), []
    backend = backend_of(array_namespace(q))
    override = backend.kernels["softmax_attention"][-1]

    def run(*args: Any, **kwargs: Any) -> Any:
        called.append(kwargs)
        return override.run(*args, **kwargs)

    changed = (Override(override.name, run, override.declines),)
    replace_kernels(monkeypatch, backend, {**backend.kernels, "softmax_attention": changed})
    subquad.attention(q, q, q, "exact")
    assert len(called) == 1
    subquad.attention(q, q, q, "exact", implementation="generic")
    assert len(called) == 1
    subquad.attention(q, q, q, "nystrom", num_landmarks=2)
    assert len(called) > 1


@pytest.mark.parametrize(("delta", "kept"), [("float16", "float16"), ("float32", "float32")])
def test_half_precision_reaches_the_scan_as_it_is(delta: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a kernel that reads it; where the rows differ all are widened, and parameters always."""
    backend, seen = backend_of(np), {}
    override = backend.kernels["selective_scan"][0]

    def run(*arrays: Any, **kwargs: Any) -> Any:
        seen.update(zip(Inputs._fields, (x.dtype.name for x in arrays), strict=True))
        return override.run(*arrays, **kwargs)

    changed = (Override(override.name, run, override.declines),)
    replace_kernels(monkeypatch, backend, {**backend.kernels, "selective_scan": changed})
    half = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float16)
    A, h = -np.ones((4, 2), np.float16), np.ones((4, 2), np.float16)
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
    assert favor.kernel == "feature_product"
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
    if method == "nystrom":
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
