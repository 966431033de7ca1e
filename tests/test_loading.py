"""A backend is found by its name or entry point, and what is misspelt in it says so when it is loaded."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from interpreter import install, python

from subquad.backend import Accepts, Backend, Override
from subquad.core.loading import checked

THIRD_PARTY = """
from subquad.backend import Accepts, Backend, Override
def run(q, k, v, /, *, scale, key_mask=None):
    return q * 0 + 7
class Strict(Backend):
    library = "array_api_strict"
    overrides = (Override("softmax_attention", "seven", run, Accepts(options=frozenset({"key_mask"}))),)
BACKEND = Strict()
"""
USE = """
import array_api_strict as xp, subquad
q = xp.ones((5, 4))
chosen, out = subquad.explain("attention", q, q, q, "exact").implementation, subquad.attention(q, q, q, "exact")
print(chosen, float(out[0, 0]))
print(subquad.explain(subquad.attention, q, q, q, "exact", causal=True))
"""
EXPECTED = "seven 7.0\nsoftmax_attention on array_api_strict: generic\n  seven declined: it has no causal form"


def test_backend_of_a_third_party_by_name(tmp_path: Path) -> None:
    """A package `subquad_<library>` on the path is a backend."""
    pytest.importorskip("array_api_strict")
    (tmp_path / "subquad_array_api_strict").mkdir()
    (tmp_path / "subquad_array_api_strict" / "__init__.py").write_text(THIRD_PARTY, encoding="utf-8")
    assert python(USE, tmp_path) == EXPECTED


def test_backend_of_a_third_party_by_entry_point(tmp_path: Path) -> None:
    """Any module is a backend if its distribution has the entry point, whatever its name."""
    pytest.importorskip("array_api_strict")
    install(tmp_path, "someone_elses", THIRD_PARTY, "subquad.backends", "array_api_strict")
    assert python(USE, tmp_path) == EXPECTED


def test_a_misspelt_kernel_fails_at_the_first_array_of_its_library(tmp_path: Path) -> None:
    """Such an override would never run, and nobody would know. NumPy's arrays are none of its business."""
    pytest.importorskip("array_api_strict")
    misspelt = THIRD_PARTY.replace("softmax_attention", "softmax_atention")
    install(tmp_path, "someone_elses", misspelt, "subquad.backends", "array_api_strict")
    code = """
import array_api_strict as xp, numpy, subquad
q = numpy.ones((5, 4))
subquad.attention(q, q, q, "exact")
try:
    subquad.linear_scan(xp.ones((5, 4)), xp.ones((5, 4)))
except ValueError as error:
    print(error)
"""
    said = python(code, tmp_path)
    assert said.startswith("someone_elses, override 'seven': there is no kernel 'softmax_atention'")
    assert "did you mean 'softmax_attention'" in said


class Plain(Backend):
    library = "plain"


def with_overrides(*overrides: Any) -> type[Backend]:
    return type("Changed", (Plain,), {"overrides": overrides})


def override(kernel: str = "linear_scan", **accepts: Any) -> Override:
    return Override(kernel, "fast", lambda *arrays, **static: arrays[0], Accepts(**accepts))


# id → (the class or what stands for BACKEND, error, words of the message)
WRONG: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "no backend": (None, TypeError, ["a_package must have BACKEND, an instance of a subclass of subquad.backend.Backend"]),
    "a class": (Plain, TypeError, ["must have BACKEND, an instance"]),
    "hook": (type("B", (Plain,), {"fold_block": None})(), TypeError, ["'fold_block'", "did you mean 'fold_blocks'"]),
    "inherited hook": (type("B", (type("A", (Plain,), {"in_place": True}),), {})(), TypeError, ["'in_place'", "fills_in_place"]),
    "no override": (with_overrides(lambda: 0)(), TypeError, ["overrides of a_package holds", "expected subquad.backend.Override"]),
    "kernel": (with_overrides(override("liner_scan"))(), ValueError, ["no kernel 'liner_scan'", "did you mean 'linear_scan'", "Known: "]),
    "option": (with_overrides(override("feature_step", options=frozenset({"key_masks"})))(), ValueError,
               ["override 'fast' of feature_step", "no option 'key_masks'", "did you mean 'key_mask'"]),
    "option of none": (with_overrides(override(options=frozenset({"key_mask"})))(), ValueError,
                       ["override 'fast' of linear_scan", "no option 'key_mask'"]),
    "condition": (with_overrides(override(under=frozenset({"recorder"})))(), ValueError,
                  ["override 'fast' of linear_scan", "no condition 'recorder'", "did you mean 'recorded'"]),
    "name": (with_overrides(Override("linear_scan", "generic", lambda: 0))(), ValueError, ["'generic'", "linear_scan"]),
    "two of a name": (with_overrides(override(), override())(), ValueError, ["two overrides", "'fast'", "linear_scan"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_misspelt_says_so_at_load(case: str) -> None:
    given, error, words = WRONG[case]
    package = ModuleType("a_package")
    if given is not None:
        package.BACKEND = given  # type: ignore[attr-defined]
    with pytest.raises(error) as caught:
        checked(package)
    for word in words:
        assert word in str(caught.value)


def test_what_is_right_is_taken() -> None:
    package = ModuleType("a_package")
    package.BACKEND = with_overrides(
        override("feature_step", options=frozenset({"key_mask"}), under=frozenset({"tracing"}))
    )()  # type: ignore[attr-defined]
    assert checked(package) is package.BACKEND
