"""Kernels kept on disk are found again as long as nothing that they are made of has changed, and then no more."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llvmlite")

from subquad.attention import machine_times
from subquad_numpy.codegen import compile as codegen_compile
from subquad_numpy.codegen import machine

PARTS = [  # a kernel, and where a part of it or a number in it is written
    ("subquad_numpy.clustered.forward", "subquad_numpy.clustered.forward"),
    ("subquad_numpy.clustered.forward", "subquad_numpy.block_attention.tiles"),
    ("subquad_numpy.clustered.tree", "subquad.kernels.balanced_tree"),
    ("subquad_numpy.mamba_step.kernel", "subquad_numpy.mamba_step.layout"),
    ("subquad_numpy.linear_scan.kernel", "subquad_numpy.codegen.types"),
    ("subquad_jax.handler", "subquad_numpy.runtime.huge_pages"),
]
STRANGERS = [
    ("subquad_numpy.clustered.forward", "subquad_numpy.features.step"),
    ("subquad_numpy.clustered.forward", "subquad.core.gather"),  # imported by the formulas
]


@pytest.mark.parametrize(
    ("kernel", "part", "counts"), [*((*x, True) for x in PARTS), *((*x, False) for x in STRANGERS)]
)
def test_a_change_of_a_part_is_a_change_of_the_kernel(
    kernel: str, part: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        path, changed = (Path(str(importlib.import_module(name).__file__)) for name in (kernel, part))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    read, caches = Path.read_bytes, (codegen_compile.fingerprint, codegen_compile.read_source)

    def fresh() -> str:
        for function in caches:
            function.cache_clear()
        return codegen_compile.fingerprint(path)

    before: Any = fresh()
    assert before == fresh()
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"\n# another" * (self == changed))
    assert (fresh() != before) is counts
    monkeypatch.undo()
    assert fresh() == before


def test_sources_that_cannot_be_read_have_no_fingerprint(tmp_path: Path) -> None:
    assert codegen_compile.fingerprint(tmp_path / "missing.py") == ""


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container: kernels are kept beside their sources or not at all, and so are the times of "auto"."""
    for name in ("NUMBA_CACHE_DIR", "LOCALAPPDATA", "XDG_CACHE_HOME", "SUBQUAD_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def home() -> Path:
        msg = "Could not determine home directory."
        raise RuntimeError(msg)

    monkeypatch.setattr(Path, "home", home)
    (tmp_path / "__pycache__").touch()  # no folder
    assert machine.kept(tmp_path, "name", "0" * 16, "options", lambda: b"code") == b"code"
    folder = machine_times.cache_folder()
    with pytest.raises(OSError, match=str(folder.parent)):
        folder.mkdir(parents=True)
