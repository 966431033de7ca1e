"""What is registered is there: a new method and a new scan in explain, compare, asv, the gate and the tables of tests.

`rows/dummies.py` is all that was written for them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from interpreter import PATIENCE, install, python
from rows import dummies
from rows.libraries import Library, NumPy, Strict, Torch, relative_error

import subquad
from subquad import registry
from subquad.attention.call import AttentionCall
from subquad.core.states import StateSpec
from subquad.kernels.max_shift import divide_or_zero

ROOT = Path(__file__).parents[1]


@pytest.fixture
def _registered() -> Iterator[None]:
    with dummies.registered():
        yield


with_dummies = pytest.mark.usefixtures("_registered")
q, k, v = np.random.default_rng(0).standard_normal((3, 20, 4))


@with_dummies
def test_by_name_by_alias_and_with_options() -> None:
    expected = dummies.squares(q, k, v, np.ones(20, bool), causal=True, power=2)
    for name in ("squares", "squared"):
        assert relative_error(subquad.attention(q, k, v, name, causal=True, power=2), expected) < 1e-13
    assert repr(registry.make_method("squared", {})) == "Squares(power=1)"
    with pytest.raises(TypeError, match=r"method 'squares' has no option 'powre'; did you mean 'power'"):
        subquad.attention(q, k, v, "squares", powre=2)
    with pytest.raises(ValueError, match=r"unknown method 'sqares'; did you mean 'squares'"):
        subquad.attention(q, k, v, "sqares")
    row = registry.method_row("squared")
    assert (row.name, row.options, row.size) == ("squares", ("power",), "power")


def test_gone_again() -> None:
    with pytest.raises(ValueError, match="unknown method 'squares'"):
        subquad.attention(q, k, v, "squares")


@with_dummies
def test_explain_knows_them() -> None:
    said = subquad.explain("attention", q, k, v, "squares")
    assert [choice.kernel for choice in said.choices] == ["feature_summarize", "feature_attend"]
    assert {choice.implementation for choice in said.choices} == {"generic"}
    assert subquad.explain("blend", q, k).kernel == subquad.explain(dummies.blend, q, k).kernel == "linear_scan"
    with pytest.raises(ValueError, match="did you mean 'blend'"):
        subquad.explain("blendd", q, k)


@with_dummies
def test_asv_measures_them() -> None:
    pytest.importorskip("asv")
    with mock.patch.dict(os.environ, {"SUBQUAD_BENCH_BACKENDS": "numpy", "SUBQUAD_BENCH_PROFILE": "smoke"}):
        from asv_benchmarks.benchmarks import accuracy, operators, overhead, scaling

        for benchmark in (operators.Operator, scaling.Scaling, accuracy.Accuracy, overhead.Compile, overhead.Call):
            backends, names, *_ = benchmark().params
            assert backends == ["numpy"]
            assert {"squares", "squares causal", "blend"} <= set(names)
        for name in ("squares causal", "blend"):
            measured = operators.Operator()
            measured.setup("numpy", name, False, 256)
            measured.time_call()
            assert measured.track_extra_memory() >= 0


@with_dummies
def test_the_gate_has_them_as_cases() -> None:
    pytest.importorskip("asv")
    pytest.importorskip("rich")
    from asv_benchmarks import gate

    cases = gate.cases()
    name, arrays, positional, options = cases["squares causal"]
    assert (name, list(arrays), positional) == ("attention", ["q", "k", "v"], 3)
    assert options == {"method": "squares", "causal": True}
    assert cases["squares step"][0] == "squares"
    assert (cases["blend"][0], list(cases["blend"][1])) == ("blend", ["g", "x"])


@with_dummies
def test_compare_shows_them(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from subquad.cli import main

    assert main(["compare", "--backends", "numpy", "--n", "16", "--repeat", "1", "--out", str(tmp_path)]) == 0
    rows = {row["label"]: row for row in json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["results"]}
    assert 0 < rows["squares 1"]["error"] < 1  # it is another layer than softmax attention
    assert rows["blend"]["error"] < 2e-6


def test_every_operator_draws_inputs_that_its_library_takes() -> None:
    pytest.importorskip("asv")
    pytest.importorskip("rich")
    from asv_benchmarks import harness

    for operator in harness.operators():
        problem = harness.case(operator).random(5)
        assert 5 in harness.prepare("numpy", problem).run().shape[-3:-1]  # time is before the heads in ssd


def passing(words: str, *files: str) -> list[str]:
    """The tests of these files, of NumPy and of PyTorch, that have one of the words in their names; all of them pass."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    wanted = f"({words}) and not jax and not strict and not meta and not readonly"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "rows.dummies",
        "-p",
        "no:cacheprovider",
        "-q",
        "-rp",
        "-k",
        wanted,
    ]
    done = subprocess.run(
        [*command, *(str(ROOT / "tests" / file) for file in files)], cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return re.findall(r"^PASSED (.+)", done.stdout, re.MULTILINE)


def test_the_tables_of_tests_have_them() -> None:
    """Parity, masks, causality, batches, streams, gradients: a row of its default options, and a scan's definition."""
    files = ("parity", "masks", "causality", "batch", "states", "gradients", "every_scan")
    names = passing("squares or blend", *(f"test_{name}.py" for name in files))  # in one process: it imports for long
    assert sum("squares" in name and "every_scan" not in name for name in names) > 60
    assert sum("blend" in name and "every_scan" in name for name in names) >= 6


SQUARES = (ROOT / "docs" / "examples" / "squared_attention.py",)


@pytest.mark.skipif(not SQUARES[0].exists(), reason="installed without its source tree")
def test_method_of_another_distribution(tmp_path: Path) -> None:
    """It is imported when somebody calls it by its name."""
    text = SQUARES[0].read_text(encoding="utf-8")
    install(tmp_path, "of_another", text, "subquad.methods", "squared")
    code = """
import sys, numpy, subquad
x = numpy.ones((3, 2))
subquad.attention(x, x, x, "exact")
before = "of_another" in sys.modules
print(subquad.attention(x, x, x, "squared").tolist(), before, "squared" in subquad.METHODS)
"""
    assert python(code, tmp_path) == "[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]] False True"


@with_dummies
def test_a_name_that_is_taken_is_refused() -> None:
    for names in (("squares",), ("new", ["squared"]), ("performer",), ("new", ["exact"])):
        with pytest.raises(ValueError, match=r"the name '\w+' is taken by \w+(\.\w+)+; choose another"):
            registry.register(names[0], aliases=names[-1] if len(names) > 1 else ())(
                type("Other", (subquad.Exact,), {})
            )
    with pytest.raises(ValueError, match=r"the name .blend. is taken by rows\.dummies\.blend"):
        registry.register_scan("blend")(lambda: None)
    assert "new" not in registry.METHODS


def test_a_class_that_is_defined_again_takes_its_own_place() -> None:
    """As in a notebook, where a cell runs twice."""
    try:
        for power in (1, 2):

            @registry.register("again")
            @dataclass(frozen=True, repr=False)
            class Again(dummies.Squares):
                own: int = power

            assert repr(registry.make_method("again", {})).endswith(f"Again(power=1, own={power})")
    finally:
        registry.METHODS.pop("again", None)


def merge_sums(xp: Any, left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    return {name: left[name] + right[name] for name in left}


@dataclass(frozen=True, repr=False)
class MeanOfValues(subquad.Method):
    """The mean of the visible values, by what it does to a state of its own."""

    state = StateSpec({"total": (1, "d_v"), "count": (1, 1)}, merge_sums)

    def _sums(self, call: AttentionCall, rows: Callable[..., Any]) -> dict[str, Any]:
        xp, keep = call.xp, True if call.key_mask is None else call.key_mask[..., None]
        v = xp.where(keep, call.v, 0.0)
        counted = xp.where(keep, xp.ones_like(call.v[..., :1]), 0.0)
        return {"total": rows(v, axis=-2), "count": rows(counted, axis=-2)}

    def _summarize(self, call: AttentionCall) -> dict[str, Any]:
        return self._sums(call, functools.partial(call.xp.sum, keepdims=True))

    def _attend(self, call: AttentionCall) -> Any:
        mean = divide_or_zero(call.xp, call.state["total"], call.state["count"])
        return call.xp.broadcast_to(mean, (*mean.shape[:-2], call.q.shape[-2], mean.shape[-1]))

    def _step(self, call: AttentionCall) -> tuple[Any, dict[str, Any]]:
        sums = self._sums(call, call.xp.cumulative_sum)
        if call.state is not None:
            sums = merge_sums(call.xp, sums, call.state)
        out = divide_or_zero(call.xp, sums["total"], sums["count"])
        return out, {name: x[..., -1:, :] for name, x in sums.items()}


@pytest.mark.parametrize("library", [NumPy(), Strict(), Torch()], ids=str)
@pytest.mark.parametrize(("n", "n_kv"), [(9, 9), (4, 9), (9, 4)])
def test_a_method_is_what_it_does_to_a_state(library: Library, n: int, n_kv: int) -> None:
    """Of its own, with a merge of its own; whoever gives these verbs has every call, also with fewer keys and more."""
    method, mask = MeanOfValues(), np.arange(n_kv) % 3 > 0
    rng = np.random.default_rng(0)
    given = rng.standard_normal((2, n, 4)), rng.standard_normal((2, n_kv, 4)), rng.standard_normal((2, n_kv, 3)), mask

    def calls(q: Any, k: Any, v: Any, mask: Any) -> Any:
        parts = [
            method.summarize(k[:, some, :], v[:, some, :], key_mask=mask[some]) for some in (slice(2), slice(2, None))
        ]
        merged = method.attend(q, method.merge(*parts))
        return method(q, k, v, key_mask=mask), merged, method(q, k, v, key_mask=mask, causal=True)

    whole, merged, causal = map(library.numpy, library.call(calls, *given, dtype="float64"))
    for seen, out in ((np.ones((n, n_kv)), whole), (np.ones((n, n_kv)), merged), (np.tri(n, n_kv, n_kv - n), causal)):
        weights = seen * mask
        expected = weights @ given[2] / np.maximum(weights.sum(axis=1, keepdims=True), 1)
        assert relative_error(out, expected) < 1e-14


@pytest.mark.parametrize("name", ["selective_scan", subquad.selective_scan])
def test_a_scan_by_name_and_by_function(name: object) -> None:
    assert registry.scan_row(name) is registry.SCANS["selective_scan"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scan", "words"), [("linear_scam", "did you mean 'linear_scan'"), (np.cumsum, "unknown scan 'cumsum'")]
)
def test_unknown_scans(scan: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        registry.scan_row(scan)  # type: ignore[arg-type]


def test_defaults_are_those_that_the_docs_say() -> None:
    """Of every public function and method; None stands for a default that depends on other options."""
    for name in subquad.__all__:
        public = getattr(subquad, name)
        for names, said in re.findall(
            r"^(\w+(?:, \w+)*) : .*\bdefault (.+)$", inspect.getdoc(public) or "", re.MULTILINE
        ):
            for option in names.split(", "):
                default = inspect.signature(public).parameters[option].default
                assert default is None or default == ast.literal_eval(said), f"{name}: {option}"
