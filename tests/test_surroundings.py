"""Calls work whatever surrounds them: error states, devices, packages that are broken, forks, missing sources."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import pytest
from interpreter import TWO_DEVICES, python
from rows.kernels import without_overrides

import subquad
from subquad import registry


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


@pytest.mark.parametrize("spec", [(None, "s"), (None, None, "s")])
def test_sharded_arrays_of_jax(spec: tuple[Any, ...]) -> None:
    """Eager calls on arrays that lie on several devices, whose partition fits no constant of another shape."""
    pytest.importorskip("jax")
    code = f"""
        import jax, numpy as np, subquad
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        mesh = Mesh(np.array(jax.devices()), ("s",))
        x = np.random.default_rng(0).standard_normal((2, 4, 64, 8)).astype(np.float32)
        q = jax.device_put(x, NamedSharding(mesh, P(*{spec!r})))
        for method, options in (("exact", {{}}), ("exact", {{"causal": True}}), ("favor", {{"num_features": 16}}),
                                ("linear", {{"causal": True}}), ("nystrom", {{"num_landmarks": 8}})):
            got = subquad.attention(q, q, q, method, **options)
            assert np.abs(np.asarray(got) - subquad.attention(x, x, x, method, **options)).max() < 1e-4, method
        print("done")
    """
    assert "done" in python(code, **TWO_DEVICES)


def test_an_installed_llvmlite_that_cannot_be_imported(tmp_path: Any) -> None:
    """Such as one for another machine: the generic form serves, and `explain` says why."""
    (tmp_path / "llvmlite.py").write_text('raise ImportError("for another machine")')
    code = f"""
        import sys; sys.path.insert(0, {str(tmp_path)!r})
        import numpy as np, subquad
        x = np.ones((40, 4))
        for method in subquad.METHODS:
            print(subquad.attention(x, x, x, method).shape, subquad.explain("attention", x, x, x, method))
        print(subquad.linear_scan(x, x).shape, subquad.selective_scan(x, x, -np.ones((4, 2)), x[:, :2], x[:, :2]).shape)
    """
    assert "llvmlite is installed, but its import raises ImportError: for another machine" in python(code)


def test_an_llvmlite_that_is_too_old(tmp_path: Any) -> None:
    """Such as an old Numba comes with: the generic form serves, and `explain` says what is needed."""
    (tmp_path / "llvmlite").mkdir()
    (tmp_path / "llvmlite" / "__init__.py").write_text('__version__ = "0.43.0"')
    (tmp_path / "llvmlite" / "binding.py").write_text("")
    code = f"""
        import sys; sys.path.insert(0, {str(tmp_path)!r})
        import numpy as np, subquad
        x = np.ones((40, 4))
        print(subquad.linear_scan(x, x).shape, subquad.explain("linear_scan", x, x))
    """
    told = python(code)
    assert "(40, 4) linear_scan on numpy: generic" in told
    assert "compiled declined: kernels need llvmlite 0.44 or newer, and 0.43.0 is installed" in told


@pytest.mark.parametrize("form", ["pyc", "zip"])
def test_the_package_without_its_source_files(form: str, tmp_path: Any) -> None:
    """A zip file: kernels are compiled anew in each process. Compiled files alone: the generic forms serve."""
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
    python(code)
    place = tmp_path / ("copy" if form == "pyc" else "copy.zip")
    code = f"""
        import sys; sys.path.insert(0, {str(place)!r})
        import numpy as np, subquad
        assert subquad.__file__.startswith({str(place)!r}), subquad.__file__
        x = np.ones((40, 4))
        print(subquad.attention(x, x, x, "linear").shape, subquad.linear_scan(x, x).shape)
        print(subquad.explain("attention", x, x, x, "linear"))
    """
    told = python(code)
    assert "(40, 4) (40, 4)" in told
    assert ("generic" if form == "pyc" else "on numpy: compiled") in told


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
            os._exit(0 if torch.isfinite(y).all() and y.abs().sum() > 0 else 1)
        assert os.waitpid(child, 0)[1] == 0
        print("done")
    """
    assert "done" in python(code)


def test_tables_of_what_is_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full table is cleared. Its size is above 256: equal integers up to there are one object in Python."""
    from subquad.attention import remembered as of_attention
    from subquad.core import kernel
    from subquad.kernels import linear_scan, softmax_attention
    from subquad.scans import call as of_scans

    full, x = 300, np.ones((2, 7, 3))
    tables = [
        (of_attention.KEPT, of_attention, "MAX_KEPT"),
        (of_scans.FORMS, of_scans, "MAX_KEPT"),
        (softmax_attention.chosen, kernel, "MAX_KEPT"),
        (linear_scan.chosen, kernel, "MAX_KEPT"),
        (registry.MADE, registry, "MOST_MADE"),
    ]
    for table, module, name in tables:
        monkeypatch.setattr(module, name, full)
        table.clear()
        table.update(dict.fromkeys(range(full)))
    subquad.attention(x, x, x, "exact", implementation="generic")
    subquad.linear_scan(x, x)
    for table, _, _ in tables:
        assert 0 < len(table) < full
        table.clear()
