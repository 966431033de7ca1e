"""What the door refuses: arrays that mean more than their numbers, and layouts that are not dense."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rows.libraries import relative_error
from rows.times import drawn

import subquad
from subquad.core.decompositions import pseudo_inverse
from subquad.registry import SCANS

x = np.random.default_rng(0).standard_normal((20, 4))


class Quantity(np.ndarray):
    """As of packages of units: an array with a unit."""

    unit = "m"


class Magnitude:
    """As of packages of units that wrap arrays."""

    units = "m"


class Sparse:
    """As of packages of sparse arrays."""

    def todense(self) -> Any:
        return x


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (x.view(Quantity), r"is a Quantity of .*a subclass of numpy\.ndarray.*have no unit.*such as x\.value"),
        (x.view(np.recarray), r"is a recarray of numpy, a subclass .*numpy\.asarray"),
        (Magnitude(), r"is a Magnitude, not an array; .*have no unit.*\.magnitude"),
        (Sparse(), r"is a Sparse, a sparse array; make it dense: .*\.todense\(\)"),
    ],
    ids=["subclass", "record", "units", "sparse"],
)
def test_what_is_more_than_numbers_is_refused(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match="^q " + message):
        subquad.attention(given, x, x, "exact")
    with pytest.raises(TypeError, match="^v " + message):
        subquad.attention(x, x, given, "favor")
    with pytest.raises(TypeError, match="^omega " + message):
        subquad.attention(x, x, x, "favor", omega=given)
    with pytest.raises(TypeError, match="^b " + message):
        subquad.linear_scan(x, given)
    with pytest.raises(TypeError, match="^A " + message):
        subquad.selective_scan(x, x, given, x, x)


def test_mapped_files_are_arrays(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "x", x.dtype, "w+", shape=x.shape)
    mapped[:] = x
    assert np.array_equal(subquad.attention(mapped, mapped, mapped, "exact"), subquad.attention(x, x, x, "exact"))


@pytest.mark.skipif(np.finfo(np.longdouble).bits == 64, reason="long double is double here")
@pytest.mark.parametrize("name", ["selective_scan", "lti_scan", "linear_scan"])
def test_long_double_is_computed_in_long_double(name: str) -> None:
    """Inputs that are equal as doubles give outputs that are not; the digits of a double are those of a double."""
    row, (arrays, options) = SCANS[name], drawn(name, 30)

    def wide(factor: Any) -> dict[str, Any]:
        kinds = {"f": np.longdouble, "c": np.clongdouble}
        return {key: y if y is None else y.astype(kinds[y.dtype.kind]) * factor for key, y in arrays.items()}

    out, other = (row.call(wide(factor), options) for factor in (np.longdouble(1), 1 + np.longdouble(2) ** -60))
    assert out.dtype in (np.longdouble, np.clongdouble)
    assert 0 < np.max(np.abs(out - other)) < 1e-15
    assert relative_error(out, row.call(arrays, options)) < 1e-14


def test_long_double_has_no_decompositions() -> None:
    q = x.astype(np.longdouble)
    with pytest.raises(NotImplementedError, match=r"linalg\.pinv of numpy has no form for .*pinv=\"iterative\""):
        subquad.attention(q, q, q, "nystrom", num_landmarks=4, pinv="exact")


@pytest.mark.parametrize("names", [("svd", "eigh"), ("eigh",), ()], ids=str)
def test_pseudo_inverses_of_libraries_that_have_none(names: tuple[str, ...]) -> None:
    """By singular values or by eigenvalues, with the same cut as pinv; without either, an error that says what to take."""
    xp = ModuleType("small")
    for name in ("finfo", "matrix_transpose", "max", "where"):
        setattr(xp, name, getattr(np, name))
    xp.linalg = SimpleNamespace(**{name: getattr(np.linalg, name) for name in names})  # type: ignore[attr-defined]
    a = np.random.default_rng(1).standard_normal((3, 6, 6))
    a[0, 0] = a[0, 1]  # of rank 5
    if not names:
        with pytest.raises(NotImplementedError, match=r"small has no linalg\.pinv; take another"):
            pseudo_inverse(xp, a, 1e-3, "take another")
        return
    found = pseudo_inverse(xp, a, 1e-3, "")
    assert relative_error(found, np.linalg.pinv(a, rcond=1e-3)) < 1e-9  # AᵀA squares the condition number
