"""A trained bidirectional Mamba of another package, by public operators: its own logits, on every library."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rows.libraries import relative_error, tolerance

pytest.importorskip("typeseg")

ROOT = Path(__file__).parents[1]
KINDS = {
    "python": "subquad/tasks.py",
    "restructuredtext": "docs/recipes.rst",
    "css": "docs/_static/subquad.css",
    "c_family": "asv_benchmarks/selective_scan.cpp",
    "markdown": "asv_benchmarks/README.md",
}
LENGTH = 600  # bytes of a text
CLOSE = tolerance("float32")


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """The program of the tutorial."""
    spec = importlib.util.spec_from_file_location("trained_model", ROOT / "docs" / "tutorials" / "trained_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(program: ModuleType) -> dict[str, Any]:
    """Tokens of the beginnings of files of this repository, by their kind."""
    return {kind: program.tokens((ROOT / name).read_text(encoding="utf-8"))[:LENGTH] for kind, name in KINDS.items()}


@pytest.fixture(scope="module")
def network(program: ModuleType) -> Any:
    """The network in ONNX Runtime, as the package ships it: from tokens (n,) to logits."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(program.data("mamba_al.onnx"), options)
    return lambda ids: session.run(None, {"ids": ids})[0]


@pytest.fixture(scope="module")
def ours(program: ModuleType, texts: dict[str, Any]) -> Any:
    """The logits of all texts, in one batch."""
    return program.logits(program.weights(), np.stack(list(texts.values())))


def test_logits_are_those_of_the_network(texts: dict[str, Any], network: Any, ours: Any) -> None:
    for ids, got in zip(texts.values(), ours, strict=True):
        assert relative_error(got, network(ids)) < CLOSE


def test_labels_are_right(program: ModuleType, ours: Any) -> None:
    labels = json.loads(program.data("manifest.json").read_text(encoding="utf-8"))["labels"]
    for kind, got in zip(KINDS, ours, strict=True):
        assert labels[np.bincount(got.argmax(axis=-1)).argmax()] == kind


@pytest.mark.parametrize("n", [1, 2, 3])
def test_texts_shorter_than_the_convolution(program: ModuleType, network: Any, n: int) -> None:
    ids = program.tokens("<p>")[:n]
    assert relative_error(program.logits(program.weights(), ids[None])[0], network(ids)) < CLOSE


def test_every_library_gives_them(program: ModuleType, texts: dict[str, Any], ours: Any) -> None:
    runners = program.runners(program.weights())
    assert runners.keys() >= {"NumPy"}
    for run in runners.values():
        assert relative_error(run(texts["python"]), ours[0]) < CLOSE


def test_the_package_says_it_too(program: ModuleType) -> None:
    import typeseg

    text = "<p>soup — für alle</p>\n\x07" + program.TEXT
    scores = np.exp(program.logits(program.weights(), program.tokens(text)[None])[0])
    shares, expected = scores / scores.sum(axis=-1, keepdims=True), typeseg.precise(text).char_probs
    place = 0
    for letter, wanted in zip(text, expected, strict=True):  # its shares of a letter are the means over the bytes
        size = len(letter.encode())
        assert np.abs(shares[place : place + size].mean(axis=0) - wanted).max() < CLOSE
        place += size


def test_its_numpy_code_agrees(program: ModuleType, texts: dict[str, Any], ours: Any) -> None:
    ids = texts["css"][:200]
    got = program.logits(program.weights(), ids[None])[0]
    assert relative_error(got, program.originals()["its NumPy code"](ids)) < CLOSE


def test_a_flipped_direction_is_noticed(
    program: ModuleType, texts: dict[str, Any], ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is sharp: two passes in one direction are far from the network."""
    scan = program.subquad.selective_scan
    monkeypatch.setattr(program.subquad, "selective_scan", lambda *arrays, z, reverse=False: scan(*arrays, z=z))
    got = program.logits(program.weights(), texts["python"][None])[0]
    assert relative_error(got, ours[0]) > 100 * CLOSE


def test_the_tutorial_shows_what_its_program_has_measured(program: ModuleType) -> None:
    page, facts = program.FILE.with_suffix(".rst").read_text(), json.loads(program.FILE.read_text())
    for n, ways in facts["times"].items():
        cells = "".join(f"     - {1e3 * found['seconds']:.0f}\n" for found in ways.values())
        assert f"   * - {n}\n{cells}" in page
    assert facts["text"] == program.TEXT
    assert all(line in page for line in program.TEXT.splitlines() if "return" not in line)
