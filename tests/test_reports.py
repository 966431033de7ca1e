"""Faults of earlier versions, or of peers, that a user would meet: for each kind, the right value or error."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Library, NumPy, Strict, Torch, relative_error

import subquad
from subquad import kernels, registry
from subquad.core import loading

FEW = [pytest.param(x, id=str(x)) for x in (NumPy(), Strict(), Torch(), Jax())]
EAGER_FEW = [pytest.param(x, id=str(x)) for x in (NumPy(), Strict(), Torch())]


def in_fresh_process(code: str, **environment: str) -> str:
    """The output of a Python program that runs beside this one."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=False, capture_output=True, text=True, timeout=300, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def without_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every kernel of every library take its generic form."""
    for library in ("numpy", "torch", "jax"):
        monkeypatch.setattr(type(getattr(loading, f"of_{library}")), "overrides", ())
    for name in loading.KERNELS:
        monkeypatch.setattr(getattr(kernels, name), "_chosen", {})


# Wrong numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["auto", "generic"])
@pytest.mark.parametrize("library", FEW)
@pytest.mark.parametrize(("method", "options"), [
    ("favor", {}), ("favor", {"features": "hyperbolic", "num_features": 40}), ("linear", {}),
    ("favor", {"center": (np.full(32, 9.0), np.full(32, -7.0))}),
])  # fmt: skip
def test_causal_features_of_any_size(
    method: str, options: dict[str, Any], library: Library, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of far keys underflow in one row and not in another: each row must be that of the definition."""
    if implementation == "generic":
        without_overrides(monkeypatch)
    x = 30 * np.random.default_rng(0).standard_normal((300, 32))
    x[280:] = x[:20]  # later rows that see an equal key far before them
    mask = np.arange(300) % 7 > 0
    for key_mask in (None, mask):
        exact = subquad.attention(x, x, x, method, causal=True, key_mask=key_mask, **options)

        def attend(x: Any, key_mask: Any) -> Any:
            return subquad.attention(x, x, x, method, causal=True, key_mask=key_mask, **options)

        for dtype, bound in (("float32", 1e-4), ("float64", 1e-12)):
            got = library.numpy(library.call(attend, x, key_mask, dtype=dtype))
            assert relative_error(got, exact) < bound


def test_causal_features_of_any_size_equal_their_definition() -> None:
    """Sums over logarithms in float64, which nothing can underflow."""
    x = 30 * np.random.default_rng(0).standard_normal((300, 32))
    omega = subquad.draw_omega("orthogonal", 256, 32, 0) * 32**-0.25
    log_q, log_k = x @ omega.T, x @ omega.T - (x * x).sum(-1, keepdims=True) / 2 * 32**-0.5
    log = np.logaddexp.reduce(log_q[:, None] + log_k, axis=-1)
    log[~np.tri(300, dtype=bool)] = -np.inf
    weights = np.exp(log - log.max(axis=-1, keepdims=True))
    right = weights @ x / weights.sum(axis=-1, keepdims=True)
    for dtype, bound in ((np.float64, 1e-11), (np.float32, 1e-4)):
        got = subquad.attention(*3 * [x.astype(dtype)], "favor", causal=True)
        assert relative_error(got, right) < bound


def test_gradient_of_causal_features_of_any_size() -> None:
    """The repair of rows must not put NaN into gradients of the rows that it leaves."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(10 * np.random.default_rng(0).standard_normal((40, 8)))
    found = []
    for dtype in (torch.float64, torch.float32):
        given = x.to(dtype).requires_grad_()
        out = subquad.attention(given, given, given, "favor", causal=True, num_features=16)
        found.append(torch.autograd.grad(out.sum(), given)[0].double().numpy())
    assert relative_error(found[1], found[0]) < 1e-3


@pytest.mark.parametrize("implementation", ["auto", "generic"])
@pytest.mark.parametrize("library", FEW)
def test_growing_scans_of_zeros_stay_zero(library: Library, implementation: str) -> None:
    """exp(Δ A) over many steps overflows, but the state that it multiplies is 0."""
    n = 3000
    u, one = np.zeros((n, 2)), np.ones((n, 3))
    u[-1] = 1

    def scan(u: Any, delta: Any, A: Any, one: Any) -> Any:
        return subquad.selective_scan(u, delta, A, one, one, implementation=implementation)

    y = library.numpy(library.call(scan, u, np.ones((n, 2)), np.ones((2, 3)), one, dtype="float32"))
    assert np.array_equal(y[:-1], np.zeros((n - 1, 2)))
    assert np.array_equal(y[-1], [3, 3])

    def linear(a: Any, b: Any) -> Any:
        return subquad.linear_scan(a, b, implementation=implementation)

    a = np.full((n, 2), 2.0)
    h = library.numpy(library.call(linear, a, u, dtype="float32"))
    assert np.array_equal(h, u)
    a[1::2, 1] = 0  # a factor of 0 forgets a product that has overflowed
    h = library.numpy(library.call(linear, a, u, dtype="float32"))
    assert np.array_equal(h, u)


def test_merged_scans_of_zeros_stay_zero() -> None:
    a, b = np.full((2000, 1), 2.0), np.zeros((2000, 1))
    state = subquad.summarize_scan("linear_scan", a, b)
    for _ in range(3):
        state = subquad.merge_scan(state, state)
    assert np.isinf(state["decay"])
    assert state["state"] == 0
    none = subquad.summarize_scan("linear_scan", 0 * a, b)
    for pair in ((none, state), (state, none)):
        assert subquad.merge_scan(*pair)["decay"] == 0


@pytest.mark.parametrize("library", FEW)
@pytest.mark.parametrize("wide", ["initial_state", "C", "A"])
def test_half_precision_beside_float64_is_computed_in_float64(library: Library, wide: str) -> None:
    if "float16" not in library.known_dtypes or isinstance(library, Strict | Jax):
        pytest.skip("no half precision beside float64")
    rng = np.random.default_rng(0)
    n, d, d_state = 40, 3, 2
    given = {
        "u": rng.standard_normal((n, d)),
        "delta": rng.uniform(0.1, 1, (n, d)),
        "A": -rng.uniform(0.1, 1, (d, d_state)),
        "B": rng.standard_normal((n, d_state)),
        "C": rng.standard_normal((n, d_state)),
        "initial_state": rng.standard_normal((d, d_state)),
    }
    exact = {
        name: x if name in (wide, "initial_state") else x.astype(np.float16).astype(float) for name, x in given.items()
    }

    def scan(given: dict[str, Any], **options: Any) -> Any:
        return subquad.selective_scan(
            *(given[x] for x in ("u", "delta", "A", "B", "C")),
            initial_state=given["initial_state"],
            return_state=True,
            **options,
        )

    for x in ("A", "B", "C"):
        if x != wide:
            exact[x] = exact[x] if x != wide else given[x]
    _, right = scan(exact)
    arrays = {
        name: library.array(x, "float64" if name in (wide, "initial_state") else "float16") for name, x in given.items()
    }
    for implementation in ("auto", "generic"):
        y, state = scan(arrays, implementation=implementation)
        assert library.dtype_name(y) == "float16"
        assert library.dtype_name(state) == "float64"
        assert relative_error(library.numpy(state), right) < 1e-14


@pytest.mark.parametrize("landmarks", ["uniform", "segment-means"])
def test_hidden_rows_reach_no_gradient(landmarks: str) -> None:
    torch = pytest.importorskip("torch")
    for hidden in (3, 2):
        q = torch.rand(3, 2, requires_grad=True)
        k = torch.full((3, 2), torch.nan)
        k[hidden:] = 1.0
        mask = torch.arange(3) >= hidden
        out = subquad.attention(
            q,
            k,
            k[:, :1],
            "nystrom",
            num_landmarks=2,
            landmarks=landmarks,
            key_mask=mask,
            query_mask=torch.ones(3, dtype=torch.bool),
        )
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("library", [pytest.param(x, id=str(x)) for x in (NumPy(), Torch(), Jax())])
def test_few_queries_over_a_long_cache(library: Library) -> None:
    """Sums over 2¹⁸ keys, for one or a small number of queries, and values of one or more columns."""
    n = 2**18
    k = np.random.default_rng(0).standard_normal((n, 64)).astype(np.float32)
    for queries, d_v in ((1, 64), (2, 8), (4, 2), (1, 1)):
        q = np.random.default_rng(1).standard_normal((queries, 64)).astype(np.float32)
        v = np.random.default_rng(2).uniform(size=(n, d_v)).astype(np.float32)
        logits = q.astype(float) @ k.T.astype(float) / 8
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        right = weights @ v / weights.sum(axis=-1, keepdims=True)
        for causal in (False, True):
            if causal and queries > 1:
                continue

            def attend(q: Any, k: Any, v: Any, causal: bool = causal) -> Any:
                return subquad.attention(q, k, v, "exact", causal=causal)

            got = library.numpy(library.call(attend, q, k, v, dtype="float32"))
            assert relative_error(got, right) < 5e-6


def test_few_causal_queries_over_a_long_cache() -> None:
    torch = pytest.importorskip("torch")
    n, d = 2**17, 16
    k = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
    q = np.random.default_rng(1).standard_normal((3, d)).astype(np.float32)
    right = subquad.attention(*(x.astype(float) for x in (q, k, k)), "exact", causal=True)
    got = subquad.attention(*map(torch.from_numpy, (q, k, k)), "exact", causal=True)
    assert relative_error(got.double().numpy(), right) < 5e-6


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "favor", "linear", "nystrom"])
def test_a_mask_that_fits_two_ways_is_refused(method: str) -> None:
    mask = np.ones((3, 10), dtype=bool)
    options = {"num_landmarks": 4} if method == "nystrom" else {}
    for batch in ((3, 3), (3, 1), (3, 2, 3)):
        q = np.random.default_rng(0).standard_normal((*batch, 10, 4))
        with pytest.raises(ValueError, match=r"key_mask has shape \(3, 10\) beside arrays of batch shape"):
            subquad.attention(q, q, q, method, key_mask=mask, **options)
        for full in (
            mask.reshape(3, *[1] * (len(batch) - 1), 10),
            mask[(None,) * (len(batch) - 1)][..., : batch[-1], :],
        ):
            assert subquad.attention(q, q, q, method, key_mask=full, **options).shape == q.shape
    q = np.random.default_rng(0).standard_normal((2, 3, 10, 4))  # one reading alone: a mask of each head
    assert subquad.attention(q, q, q, method, key_mask=mask, **options).shape == q.shape
    grouped = np.random.default_rng(0).standard_normal((2, 4, 10, 4))
    with pytest.raises(ValueError, match="key_mask has shape"):
        subquad.attention(grouped, grouped[:, :2], grouped[:, :2], method, key_mask=mask[:2], **options)


def test_a_mask_that_fits_two_ways_is_refused_everywhere() -> None:
    q, mask = np.ones((3, 3, 10, 4)), np.ones((3, 10), dtype=bool)
    with pytest.raises(ValueError, match="key_mask has shape"):
        subquad.Linear().summarize(q, q, key_mask=mask)
    with pytest.raises(ValueError, match="key_mask has shape"):
        subquad.Linear().step(q, q, q, key_mask=mask)
    with pytest.raises(ValueError, match="query_mask has shape"):
        subquad.attention(q, q, q, "nystrom", num_landmarks=2, query_mask=mask)


def test_the_advice_on_scales_is_right() -> None:
    """A scale given as an array is multiplied into queries and keys, by its root each, for every method."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 20, 4))
    scale = np.asarray([0.3, 2.0])[:, None, None]
    with pytest.raises(TypeError, match="multiply q and k by its square root"):
        subquad.attention(q, k, v, "linear", scale=scale)
    for method in registry.METHODS:
        options = {"num_landmarks": 3} if method == "nystrom" else {}
        got = subquad.attention(scale**0.5 * q, scale**0.5 * k, v, method, scale=1, **options)
        for i in range(2):
            right = subquad.attention(q[i], k[i], v[i], method, scale=float(scale[i, 0, 0]), **options)
            assert relative_error(got[i], right) < 1e-12


TORCH_TENSORS = {
    "nested": lambda torch: torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(5, 4)], layout=torch.jagged),
    "nested-strided": lambda torch: torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(5, 4)]),
    "sparse": lambda torch: torch.eye(4).to_sparse(),
    "csr": lambda torch: torch.eye(4).to_sparse_csr(),
    "quantised": lambda torch: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch calls these layouts prototypes
@pytest.mark.parametrize("kind", TORCH_TENSORS)
def test_layouts_that_cannot_be_computed_with(kind: str) -> None:
    torch = pytest.importorskip("torch")
    x, plain = TORCH_TENSORS[kind](torch), torch.rand(5, 4)
    word = {"nested-strided": "nested", "csr": "layout", "sparse": "layout"}.get(kind, kind)
    for call, name in (
        (lambda: subquad.attention(x, x, x, "exact"), "q"),
        (lambda: subquad.attention(plain, plain, x, "favor"), "v"),
        (lambda: subquad.Linear().summarize(x, x), "k"),
        (lambda: subquad.linear_scan(plain, x), "b"),
        (lambda: subquad.selective_scan(x, plain, plain, plain, plain), "u"),
    ):
        with pytest.raises(TypeError, match=rf"^{name} is a .*{word}"):
            call()


def test_numbers_and_pairs_that_no_option_can_be() -> None:
    q = np.ones((5, 4))
    for method, options in (
        ("exact", {"scale": 10**400}), ("favor", {"num_features": 10**400}), ("nystrom", {"num_landmarks": 2**70}),
        ("nystrom", {"iterations": 10**400}), ("nystrom", {"pinv": "ridge", "ridge": 10**400}),
        ("nystrom", {"pinv": "exact", "rcond": 10**400}), ("favor", {"features": "relu", "kernel_epsilon": 10**400}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{list(options)[-1]} must be .* got an integer of \d+ bits"):
            subquad.attention(q, q, q, method, **options)
    for option, make in (("center", subquad.Favor), ("landmarks", subquad.Nystrom)):
        for pair in ((None, None), (q, None), (None, q)):
            with pytest.raises(TypeError, match=rf"{option}\[\d\] .* is a NoneType, not an array"):
                make(**{option: pair})
    state = subquad.Linear().summarize(q, q)
    for shift in (np.ones(3), np.ones(()), np.ones((7, 1)), np.ones((2, 1))):
        for pair in (({**state, "shift": shift}, state), (state, {**state, "shift": shift})):
            with pytest.raises(ValueError, match=r"\['shift'\] ends in"):
                subquad.Linear().merge(*pair)


@pytest.mark.parametrize("library", FEW)
def test_integers_of_any_size_are_numbers(library: Library) -> None:
    q = np.random.default_rng(0).standard_normal((12, 4))
    for method, big, same in (
        ("nystrom", {"num_landmarks": 3, "pinv": "ridge", "ridge": 2**70}, {"ridge": 2.0**70}),
        ("nystrom", {"num_landmarks": 3, "pinv": "exact", "rcond": 2**70}, {"rcond": 2.0**70}),
        ("favor", {"features": "relu", "kernel_epsilon": 2**70}, {"kernel_epsilon": 2.0**70}),
        ("exact", {"scale": 2**70}, {"scale": 2.0**70}),
        ("favor", {"seed": 2**70}, {}),
    ):
        found = [
            library.numpy(library.call(lambda q, o=o, m=method: subquad.attention(q, q, q, m, **o), q, dtype="float32"))
            for o in (big, {**big, **same})
        ]
        assert np.array_equal(*found, equal_nan=True)  # in float32 a sum of such numbers may overflow


# Errors where there should be none ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*registry.METHODS, *registry.SCANS, "step", "stream", "generic"])
def test_underflow_is_no_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of far keys are 0 by intention, whatever the program's settings."""
    x = 30 * np.random.default_rng(0).standard_normal((300, 8))
    u, A = np.abs(x), -100 * np.ones((8, 3))
    if name == "generic":
        without_overrides(monkeypatch)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        if name in registry.METHODS or name == "generic":
            for method in registry.METHODS if name == "generic" else [name]:
                for causal in (False, True) if registry.METHODS[method].causal is True else (False,):
                    assert np.isfinite(subquad.attention(x, x, x, method, causal=causal)).all()
        if name in ("selective_scan", "generic"):
            subquad.selective_scan(x, u, A, x[:, :3], x[:, :3], z=x * 1e9)
            subquad.selective_scan_step(np.zeros((8, 3)), x[0], u[0], A, x[0, :3], x[0, :3])
            subquad.summarize_scan("selective_scan", x, u, A, x[:, :3], x[:, :3])
        if name in ("linear_scan", "generic"):
            subquad.linear_scan(x * 1e-200, x * 1e-300)
            state = subquad.summarize_scan("linear_scan", x * 1e-20, x)
            subquad.merge_scan(state, state)
        if name in ("step", "stream"):
            for method in (subquad.Favor(), subquad.Linear()):
                left, right = method.summarize(x, x), method.summarize(0 * x, x)
                method.attend(x, method.merge(left, right))
                method.step(x, x, x, left)


def test_methods_with_arrays_compare_and_hash() -> None:
    one, other = (subquad.Favor(omega=np.ones((2, 4))) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert (one != other) is False
    assert one != subquad.Favor(omega=np.zeros((2, 4)))
    assert one != subquad.Favor()
    assert subquad.Favor() == subquad.Favor()
    assert subquad.Favor() != subquad.Favor(seed=1)
    assert subquad.Favor() != subquad.Linear()
    assert subquad.Favor() != 3
    assert len({one, other, subquad.Favor(), subquad.Exact()}) == 3
    pairs = [subquad.Nystrom(landmarks=(np.ones((2, 4)), np.full((2, 4), x))) for x in (1.0, 1.0, 2.0)]
    assert pairs[0] == pairs[1]
    assert pairs[0] != pairs[2]


def test_a_method_is_a_static_argument_of_jit() -> None:
    jax = pytest.importorskip("jax")
    method, x = subquad.Favor(omega=np.ones((2, 4))), jax.numpy.ones((3, 4))
    out = jax.jit(lambda method, x: method(x, x, x), static_argnums=0)(method, x)
    assert np.allclose(out, method(x, x, x))


@pytest.mark.parametrize("method", ["exact", "favor", "linear", "nystrom"])
@pytest.mark.parametrize("spec", [(None, "s"), ("s",), (None, None, "s")])
def test_sharded_arrays_of_jax(method: str, spec: tuple[Any, ...]) -> None:
    """Eager calls on arrays that lie on several devices, whose partition fits no constant of another shape."""
    pytest.importorskip("jax")
    code = f"""
        import jax, numpy as np, subquad
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        mesh = Mesh(np.array(jax.devices()), ("s",))
        x = np.random.default_rng(0).standard_normal((2, 4, 64, 8)).astype(np.float32)
        q = jax.device_put(x, NamedSharding(mesh, P(*{spec!r})))
        for causal in (False, True)[: 1 + ({method!r} != "nystrom")]:
            options = {{"num_landmarks": 8}} if {method!r} == "nystrom" else {{}}
            right = subquad.attention(x, x, x, {method!r}, causal=causal, **options)
            for call in (subquad.attention, jax.jit(subquad.attention, static_argnums=3, static_argnames=("causal", *options))):
                got = call(q, q, q, {method!r}, causal=causal, **options)
                assert np.abs(np.asarray(got) - right).max() < 1e-4, (causal, got.shape)
        print("done")
    """
    assert "done" in in_fresh_process(code, XLA_FLAGS="--xla_force_host_platform_device_count=2")


def test_an_installed_numba_that_cannot_be_imported(tmp_path: Any) -> None:
    """Numba beside a NumPy that is too new for it raises ImportError: the generic form serves, and `explain` says why."""
    (tmp_path / "numba.py").write_text('raise ImportError("Numba needs NumPy 2.3 or less")')
    code = f"""
        import sys; sys.path.insert(0, {str(tmp_path)!r})
        import numpy as np, subquad
        x = np.ones((40, 4))
        for method in subquad.METHODS:
            print(subquad.attention(x, x, x, method).shape, subquad.explain("attention", x, x, x, method))
        print(subquad.linear_scan(x, x).shape, subquad.selective_scan(x, x, -np.ones((4, 2)), x[:, :2], x[:, :2]).shape)
    """
    assert "numba is installed, but its import raises ImportError: Numba needs NumPy" in in_fresh_process(code)


@pytest.mark.parametrize("form", ["pyc", "zip"])
def test_the_package_without_its_source_files(form: str, tmp_path: Any) -> None:
    """Compiled files alone, or a zip file: kernels are compiled anew in each process."""
    code = f"""
        import compileall, pathlib, shutil, sys, zipfile
        import subquad, subquad_numpy
        folder = pathlib.Path({str(tmp_path)!r}, "copy")
        for package in (subquad, subquad_numpy):
            source = pathlib.Path(package.__file__).parent
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
        if {form!r} == "pyc":
            compileall.compile_dir(folder, legacy=True, quiet=1)
            for path in folder.rglob("*.py"):
                path.unlink()
        else:
            shutil.make_archive(str(folder), "zip", folder)
    """
    in_fresh_process(code)
    place = tmp_path / ("copy" if form == "pyc" else "copy.zip")
    code = f"""
        import sys; sys.path.insert(0, {str(place)!r})
        import numpy as np, subquad
        assert subquad.__file__.startswith({str(place)!r}), subquad.__file__
        x = np.ones((40, 4))
        print(subquad.attention(x, x, x, "linear").shape, subquad.linear_scan(x, x).shape)
        print(subquad.explain("attention", x, x, x, "linear"))
    """
    told = in_fresh_process(code)
    assert "(40, 4) (40, 4)" in told
    assert "numba" in told


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", ["import torch, subquad", "import torch"])
def test_a_fork_after_torch_has_started_its_threads(before: str) -> None:
    pytest.importorskip("torch")
    code = f"""
        import os, signal, sys
        {before}
        torch.set_num_threads(2)
        (torch.rand(2000, 2000) @ torch.rand(2000, 2000)).sum()
        torch.rand(10**7).exp().sum()
        child = os.fork()
        if child == 0:
            signal.alarm(120)
            import subquad
            u = torch.rand(4, 500, 16)
            y = subquad.selective_scan(u, u, -torch.ones(16, 4), u[..., :4], u[..., :4])
            os._exit(0 if torch.isfinite(y).all().item() in (True, False) else 1)
        assert os.waitpid(child, 0)[1] == 0
        print("done")
    """
    assert "done" in in_fresh_process(code)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["narrow", "wide", "strided", "masked", "gradient", "off"])
@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_on_torch_holds_no_matrix_of_logits(form: str, causal: bool) -> None:
    """PyTorch forms all logits silently where a condition of its fused kernel does not hold; 4096² floats are 67 MB."""
    torch = pytest.importorskip("torch")
    from subquad_torch.bench import peak_extra_memory

    n = 4096
    q, k, v = torch.rand(3, 1, n, 64)
    widths = {"narrow": 32, "wide": 96}
    if form in widths:
        v = torch.rand(1, n, widths[form])
    if form == "strided":
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    mask = torch.arange(n) % 3 > 0 if form == "masked" and not causal else None
    if form == "gradient":
        v = v[..., :32].clone().requires_grad_()

    def attend() -> Any:
        out = subquad.attention(q, k, v, "exact", causal=causal, key_mask=mask)
        return torch.autograd.grad(out.sum(), v)[0] if form == "gradient" else out

    torch.backends.cuda.enable_flash_sdp(form != "off")
    try:
        assert peak_extra_memory(attend) < (40e6 if form == "off" else 16e6)
        right = subquad.attention(*(x[:, :300].double() for x in (q, k, v)), "exact", causal=causal)
        got = subquad.attention(*(x[:, :300] for x in (q, k, v)), "exact", causal=causal)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert relative_error(got.detach().double().numpy(), right.detach().numpy()) < 1e-5


@pytest.mark.parametrize(("method", "causal", "options"), [
    ("exact", False, {}), ("exact", False, {"implementation": "generic"}), ("exact", True, {}),
    ("favor", False, {"features": "relu", "num_features": 32}), ("favor", True, {"features": "relu", "num_features": 32}),
])  # fmt: skip
def test_vmap_of_jax_plans_the_memory_of_a_batch(method: str, causal: bool, options: dict[str, Any]) -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((32, 1024, 16))

    def attend(q: Any) -> Any:
        return subquad.attention(q, q, q, method, causal=causal, **options)

    def planned(function: Any) -> int:
        return jax.jit(function).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert planned(jax.vmap(attend)) <= 1.3 * planned(attend) + 1e6
    assert planned(lambda x: jax.vmap(jax.vmap(attend))(x[None])) <= 2 * planned(attend)


@pytest.mark.parametrize("features", ["elu", "relu"])
def test_compiled_causal_memory_grows_with_n(features: str) -> None:
    """The largest tensor of a compiled program grows as n, not as n²."""
    torch = pytest.importorskip("torch")
    largest = []

    def attend(q: Any) -> Any:
        method = subquad.Linear() if features == "elu" else subquad.Favor(features="relu", num_features=16)
        return method(q, q, q, causal=True)

    for n in (2048, 8192):
        sizes: list[int] = []

        def look(graph: Any, _: Any, sizes: list[int] = sizes) -> Any:
            values = [node.meta.get("example_value") for node in graph.graph.nodes]
            sizes.extend(x.numel() for x in values if isinstance(x, torch.Tensor))
            return graph.forward

        torch._dynamo.reset()
        torch.compile(attend, backend=look, fullgraph=True)(torch.rand(1, n, 16))
        largest.append(max(sizes))
    torch._dynamo.reset()
    assert largest[1] <= 4 * largest[0]


@pytest.mark.parametrize("name", ["exact", "favor", "linear", "nystrom", "exact grad"])
def test_products_of_jax_have_the_highest_precision(name: str) -> None:
    """Whatever the program's setting, which is bfloat16 on a TPU and TF32 on a GPU unless it is said."""
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((2, 64, 8))
    method, _, grad = name.partition(" ")
    options = {"num_landmarks": 8} if method == "nystrom" else {}
    options |= {"features": "relu", "num_features": 8} if method == "favor" else {}

    def attend(q: Any) -> Any:
        return subquad.attention(q, q, q, method, **options)

    function = jax.jit(attend)
    if grad:
        function = jax.grad(lambda q: jax.jit(attend)(q).sum())
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(function).lower(x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert all("[HIGHEST, HIGHEST]" in line for line in products)
    assert products or method == "linear"


# Programs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", ["exact", "favor", "linear", "nystrom"])
def test_mixed_precision_compiles_in_silence(method: str, causal: bool) -> None:
    torch = pytest.importorskip("torch")
    if causal and method == "nystrom":
        pytest.skip("not causal")
    q, v = torch.rand(2, 70, 8).bfloat16(), torch.rand(2, 70, 8)
    options = {"num_landmarks": 8} if method == "nystrom" else {}

    def attend(q: Any, v: Any) -> Any:
        return subquad.attention(q, q, v, method, causal=causal, **options)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        got = torch.compile(attend, fullgraph=True, backend="eager")(q, v)
    assert got.dtype == attend(q, v).dtype == torch.float32
    assert torch.allclose(got, attend(q, v), atol=1e-5)


def test_scans_of_mixed_precision_compile_in_silence() -> None:
    torch = pytest.importorskip("torch")
    u, B, A = torch.rand(2, 40, 3).bfloat16(), torch.rand(2, 40, 2).bfloat16(), -torch.rand(3, 2)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        y = torch.compile(lambda u, B: subquad.selective_scan(u, u, A, B, B), fullgraph=True, backend="eager")(u, B)
        h = torch.compile(lambda a: subquad.linear_scan(a, a.float()), fullgraph=True, backend="eager")(u)
    assert torch.equal(y, subquad.selective_scan(u, u, A, B, B))
    assert torch.equal(h, subquad.linear_scan(u, u.float()))


DYNAMIC = {
    "exact": ("exact", {}), "exact causal": ("exact", {"causal": True}),
    "generic": ("exact", {"implementation": "generic"}),
    "generic causal": ("exact", {"implementation": "generic", "causal": True}),
    "favor": ("favor", {}), "favor causal": ("favor", {"causal": True}),
    "relu causal": ("favor", {"causal": True, "features": "relu", "num_features": 8}),
    "linear": ("linear", {}), "linear causal": ("linear", {"causal": True}),
    "nystrom": ("nystrom", {"num_landmarks": 16}),
    "uniform": ("nystrom", {"num_landmarks": 16, "landmarks": "uniform", "pinv": "ridge"}),
}  # fmt: skip


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_exported_program_serves_every_length(name: str) -> None:
    torch = pytest.importorskip("torch")
    method, options = DYNAMIC[name]

    class Module(torch.nn.Module):
        def forward(self, q: Any) -> Any:
            return subquad.attention(q, q, q, method, **options)

    length = torch.export.Dim("length", min=20, max=4096)
    program = torch.export.export(Module(), (torch.rand(2, 100, 8),), dynamic_shapes={"q": {1: length}}).module()
    for n in (20, 100, 144, 700):
        x = torch.rand(2, n, 8)
        assert torch.allclose(program(x), Module()(x), atol=1e-5)


@pytest.mark.parametrize("method", ["exact", "favor", "linear", "nystrom"])
def test_symbolic_sizes_are_recorded(method: str) -> None:
    torch = pytest.importorskip("torch")
    from torch.fx.experimental.proxy_tensor import make_fx

    options = {"num_landmarks": 16} if method == "nystrom" else {}

    def attend(q: Any) -> Any:
        return subquad.attention(q, q, q, method, **options)

    program = make_fx(attend, tracing_mode="symbolic")(torch.rand(2, 100, 8))
    x = torch.rand(2, 180, 8)
    assert torch.allclose(program(x), attend(x), atol=1e-5)


def test_nystrom_compiles_once_more_for_other_lengths() -> None:
    torch = pytest.importorskip("torch")

    def attend(q: Any) -> Any:
        return subquad.attention(q, q, q, "nystrom", num_landmarks=16)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for n in (100, 140, 160, 333):
        x = torch.rand(2, n, 8)
        assert torch.allclose(compiled(x), attend(x), atol=1e-5)
    torch._dynamo.reset()


def test_a_saved_program_loads_in_a_fresh_process(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")

    class Module(torch.nn.Module):
        def forward(self, u: Any) -> Any:
            scanned = subquad.selective_scan(u, u, -torch.ones(8, 2), u[..., :2], u[..., :2])
            return subquad.attention(scanned, u, u, "favor", causal=True)

    torch.manual_seed(0)
    x = torch.rand(2, 50, 8)
    torch.export.save(torch.export.export(Module(), (x,)), tmp_path / "saved.pt2")
    torch.save((x, Module()(x)), tmp_path / "values.pt")
    code = f"""
        import torch, subquad
        x, right = torch.load({str(tmp_path / "values.pt")!r})
        program = torch.export.load({str(tmp_path / "saved.pt2")!r}).module()
        assert torch.allclose(program(x), right, atol=1e-6)
        print("done")
    """
    assert "done" in in_fresh_process(code)


@pytest.mark.parametrize("method", ["exact", "favor", "linear", "nystrom"])
def test_dask_reads_nothing_while_a_graph_is_built(method: str) -> None:
    da = pytest.importorskip("dask.array")
    from dask.callbacks import Callback

    read = []
    x = np.random.default_rng(0).standard_normal((2, 700, 16))
    q = da.from_array(x, chunks=(2, 256, 16))
    for causal in (False, True):
        if causal and method == "nystrom":
            continue
        with Callback(pretask=lambda *_: read.append(1)):
            out = subquad.attention(q, q, q, method, causal=causal)
        assert not read
        assert relative_error(out.compute(), subquad.attention(x, x, x, method, causal=causal)) < 1e-11


@pytest.mark.parametrize("scan", ["linear_scan", "selective_scan"])
def test_forward_mode_of_scans_in_jax(scan: str) -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.linspace(0.1, 0.9, 15).reshape(5, 3)

    def function(x: Any, implementation: str = "auto") -> Any:
        if scan == "linear_scan":
            return subquad.linear_scan(x, x, implementation=implementation)
        return subquad.selective_scan(x, x, -jax.numpy.ones((3, 2)), x[:, :2], x[:, :2], implementation=implementation)

    right = jax.jacfwd(lambda x: function(x, "generic"))(x)
    assert np.allclose(jax.jacfwd(function)(x), right, atol=1e-6)
    assert np.allclose(jax.jacrev(function)(x), right, atol=1e-6)
    for _, tangent in (jax.jvp(function, (x,), (x,)), jax.jit(lambda x: jax.jvp(function, (x,), (x,)))(x)):
        assert np.allclose(tangent, np.einsum("abcd,cd->ab", right, x), atol=1e-6)
    hessians = [jax.hessian(lambda x, i=i: function(x, i).sum())(x) for i in ("auto", "generic")]
    assert np.allclose(*hessians, atol=1e-5)
