"""Every method and option on every library equals its definition, computed in float64 from explicit matrices."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from rows.libraries import (
    LIBRARIES,
    Jax,
    Library,
    NumPy,
    NumPyReadOnly,
    Strict,
    StrictNoFloat64,
    Torch,
    TorchMeta,
    relative_error,
    tolerance,
)
from rows.methods import CASES, MAIN, MAIN_CAUSAL, METHODS, D, Row, rows

import subquad
from subquad.attention.call import AttentionCall

# a row that catches one kind of mistake needs no more than each way through the code
FEW = ("n=63", "blocks", "n<n_kv", "grouped", "no-batch", "no-keys")
# compiling takes half a second, blocks of rows longer: few cases are traced
TRACED = {"grouped": ("float32", "bfloat16"), "n<n_kv": ("float64",), "blocks": ("float32",), "n=2": ("float64",)}
# not causal; "n=2" has d_v = d besides, which JAX's own attention wants
PLAIN = ("grouped", "n=2")
# bfloat16 rounds inputs and outputs only, so shapes add nothing
ROUNDED = ("n=63", "grouped")


def kinds(library: Library, row: Row, case: str) -> list[tuple[str, bool]]:
    """The pairs (dtype, causal) to test; none if row, case and library do not go together."""
    if not row.fits(CASES[case]) or (
        isinstance(library, NumPyReadOnly | StrictNoFloat64 | TorchMeta) and case not in FEW
    ):
        return []
    if row.name.startswith("window-global") and isinstance(library, Jax | TorchMeta):
        return []  # a global mask must be readable
    if isinstance(library, Jax):
        some = {"blocks": MAIN_CAUSAL, "n=2": MAIN}.get(case, METHODS)
        return [(dtype, row.causal and case not in PLAIN) for dtype in TRACED.get(case, ()) if row in some]
    dtypes = [dtype for dtype in library.dtypes if dtype != "bfloat16" or case in ROUNDED]
    return [(dtype, causal) for dtype in dtypes for causal in row.forms]


COMBINATIONS = [
    pytest.param(*library.values, row, case, id=f"{library.id}-{row}-{case}", marks=library.marks)
    for library in LIBRARIES
    for row in METHODS
    for case in CASES
    if kinds(*library.values, row, case)
]


@functools.cache
def drawn(case: str) -> dict[str, Any]:
    return CASES[case].draw()


@functools.cache
def reference(row_name: str, case: str, causal: bool, library: Library, dtype: str) -> Any:
    row = next(row for row in METHODS if row.name == row_name)
    given = library.rounded((drawn(case), row.arrays(CASES[case])), dtype)
    return row.reference(*given, causal=causal)


_numpy = Library()


def check(library: Library, row: Row, case: str, dtype: str, causal: bool) -> None:
    inputs, arrays = drawn(case), row.arrays(CASES[case])
    out = library.call(row.call(causal=causal), *inputs.values(), arrays, dtype=dtype)
    assert library.dtype_name(out) == dtype
    rounding = library if dtype == "bfloat16" else _numpy  # float32 and float64 round alike everywhere
    expected = reference(row.name, case, causal, rounding, dtype)
    assert tuple(out.shape) == expected.shape
    if library.has_values:
        assert relative_error(library.numpy(out), expected) <= tolerance(dtype)


@pytest.mark.parametrize(("library", "row", "case"), COMBINATIONS)
def test_equals_definition(library: Library, row: Row, case: str, request: pytest.FixtureRequest) -> None:
    if CASES[case].small_blocks:
        request.getfixturevalue("small_blocks")
    for dtype, causal in kinds(library, row, case):
        check(library, row, case, dtype, causal)


@rows(METHODS)
def test_raises_no_floating_point_flag(row: Row, small_blocks: None) -> None:
    """Masks, empty rows and maxima of −inf give no invalid operation, division by zero or overflow."""
    for case in ("blocks", "n>n_kv", "grouped"):
        with np.errstate(invalid="raise", divide="raise", over="raise"):
            for _, causal in kinds(_numpy, row, case):
                row.call(causal=causal)(*drawn(case).values(), row.arrays(CASES[case]))


@pytest.mark.parametrize("library", [NumPyReadOnly(), Strict()], ids=str)
@rows(MAIN)
def test_computes_in_the_dtype_of_the_inputs(
    library: Library, row: Row, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the way out casts: a double among singles would double memory and time, and no value would tell."""
    computed, leave = [], AttentionCall.leave

    def watched(call: AttentionCall, out: Any) -> Any:
        computed.append(library.dtype_name(out))
        return leave(call, out)

    monkeypatch.setattr(AttentionCall, "leave", watched)
    for case in ("grouped", "n<n_kv", "blocks"):
        library.call(row.call(causal=row.causal), *drawn(case).values(), row.arrays(CASES[case]), dtype="float32")
    assert computed == ["float32"] * 3


@pytest.mark.parametrize("library", [NumPy(), Torch()], ids=str)
@pytest.mark.parametrize("method", sorted(subquad.METHODS))
def test_two_kinds_of_half_precision_are_float32(library: Library, method: str) -> None:
    """float16 beside bfloat16: NumPy itself has no common dtype for them."""
    pytest.importorskip("ml_dtypes")
    given = [drawn("n=2")[name] for name in ("q", "k", "v")]
    q, k, v = (library.array(x, dtype) for x, dtype in zip(given, ("float16", "bfloat16", "bfloat16"), strict=True))
    single = [library.array(library.numpy(x), "float32") for x in (q, k, v)]
    out = subquad.attention(q, k, v, method)
    assert library.dtype_name(out) == "float32"
    assert np.array_equal(library.numpy(out), library.numpy(subquad.attention(*single, method)))
    assert library.dtype_name(subquad.linear_scan(q, k)) == "float32"
    A, maps = (library.array(-np.ones(shape), "bfloat16") for shape in ((D, 2), (3, 2, 2)))
    y, state = subquad.selective_scan(q, k, A, maps, maps, return_state=True)
    assert [library.dtype_name(x) for x in (y, state)] == ["float16", "float32"]


@rows(MAIN)
def test_inputs_are_not_written_to(eager: Library, row: Row) -> None:
    """The read-only row sees writes on NumPy; a copy before and after sees them everywhere."""
    if isinstance(eager, Jax):
        return  # nothing can be written to
    inputs = (*drawn("grouped").values(), row.arrays(CASES["grouped"]))
    with eager.context("float32"):
        arrays, before = eager.arrays(inputs, "float32"), eager.rounded(inputs, "float32")
        row.call(causal=row.causal)(*arrays)
    for x, y in zip(flat(arrays, eager), flat(before, eager), strict=True):
        assert np.array_equal(x, y)


def flat(tree: Any, library: Library) -> list[np.ndarray]:
    if tree is None:
        return []
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple):
        return [x for part in tree for x in flat(part, library)]
    return [tree if isinstance(tree, np.ndarray) else library.numpy(tree)]
