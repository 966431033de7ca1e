"""Quantities of pint, astropy and unyt: logits have no unit, the output has that of v, and misfits are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import relative_error
from rows.other_library import OPTIONS

import subquad


class Pint:
    def __init__(self) -> None:
        self.units = pytest.importorskip("pint")
        self.registry = self.units.get_application_registry()

    def quantity(self, x: Any, unit: str) -> Any:
        return self.registry.Quantity(x, unit)

    def numbers(self, x: Any, unit: str) -> Any:
        assert isinstance(x, self.units.Quantity)
        return x.m_as(unit)


class Astropy:
    def __init__(self) -> None:
        self.units = pytest.importorskip("astropy.units")

    def quantity(self, x: Any, unit: str) -> Any:
        return x << self.units.Unit(unit)

    def numbers(self, x: Any, unit: str) -> Any:
        assert isinstance(x, self.units.Quantity)
        return x.to_value(unit)


class Unyt:
    def __init__(self) -> None:
        self.units = pytest.importorskip("unyt")

    def quantity(self, x: Any, unit: str) -> Any:
        return self.units.unyt_array(x, unit)

    def numbers(self, x: Any, unit: str) -> Any:
        assert isinstance(x, self.units.unyt_array)
        return x.to_value(unit)


@pytest.fixture(params=[Pint, Astropy, Unyt])
def package(request: pytest.FixtureRequest) -> Any:
    return request.param()


def drawn() -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((3, 2, 30, 4)))


@pytest.mark.parametrize("method", subquad.METHODS)
def test_units_go_around_attention(package: Any, method: str) -> None:
    """q in km, k in 1/m: logits are 1000 times the product of the numbers; the output is in the unit of v."""
    q, k, v = drawn()
    options = OPTIONS.get(method, {})
    mask = np.arange(30) < 25
    out = subquad.attention(q, k, package.quantity(v, "m"), method, key_mask=mask, **options)
    want = subquad.attention(q, k, v, method, key_mask=mask, **options)
    assert relative_error(package.numbers(out, "mm"), want * 1000) <= 3e-15
    lengths = package.quantity(q, "km"), package.quantity(k, "1/m")
    if method == "linear":
        with pytest.raises(
            TypeError, match=r"^q is in km|kilometer, expected a number without a unit: Linear computes"
        ):
            subquad.attention(*lengths, v, method)
        return
    out = subquad.attention(*lengths, package.quantity(v, "kg"), method, key_mask=mask, **options)
    want = subquad.attention(q, 1000 * k, v, method, key_mask=mask, **options)
    assert relative_error(package.numbers(out, "kg"), want) <= 1e-12
    bare = subquad.attention(*lengths, v, method, key_mask=mask, **options)
    assert type(bare) is np.ndarray
    assert relative_error(bare, want) <= 1e-12


def test_restrictions(package: Any) -> None:
    q, k, v = drawn()
    bias = np.random.default_rng(1).standard_normal((30, 30))
    out, lse = subquad.attention(
        q, k, package.quantity(v, "s"), "exact", bias=package.quantity(100 * bias, "cm/m"), return_lse=True
    )
    want = subquad.attention(q, k, v, "exact", bias=bias, return_lse=True)
    assert relative_error(package.numbers(out, "s"), want[0]) <= 1e-12
    assert type(lse) is np.ndarray
    assert relative_error(lse, want[1]) <= 1e-12


def test_float32_stays(package: Any) -> None:
    q, k, v = (x.astype(np.float32) for x in drawn())
    out = subquad.attention(package.quantity(q, "m"), package.quantity(k, "1/m"), package.quantity(v, "m"), "exact")
    assert package.numbers(out, "m").dtype == np.float32


def test_linear_scan(package: Any) -> None:
    a, b, _ = drawn()
    start = np.random.default_rng(1).standard_normal((2, 4))
    h, state = subquad.linear_scan(
        package.quantity(100 * a, "cm/m"), package.quantity(b, "kg"), initial_state=package.quantity(1000 * start, "g"),
        return_state=True,
    )  # fmt: skip
    want = subquad.linear_scan(a, b, initial_state=start, return_state=True)
    for one, other in zip((h, state), want, strict=True):
        assert relative_error(package.numbers(one, "g"), 1000 * other) <= 1e-11
    assert relative_error(package.numbers(subquad.linear_scan(a, package.quantity(b, "s")), "s"),
                          subquad.linear_scan(a, b)) <= 3e-15  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: subquad.attention(m, m, x, "exact"), "^k is in m(eter)?, expected a unit of the dimension of 1 ?/ ?m"),
        (lambda x, m: subquad.attention(m, x, m, "favor"), "^k is in no unit, expected a unit of the dimension of 1 ?/ ?m"),
        (lambda x, m: subquad.attention(x, m, m, "favor"), "^k is in m.*expected a number without a unit: logits q·k must"),
        (lambda x, m: subquad.attention(x, x, m, "exact", bias=m), "^bias is in m"),
        (lambda x, m: subquad.attention(x, x, x, "favor", omega=m[0]), "^omega is a quantity of .*such as x"),
        (lambda x, m: subquad.linear_scan(m, x), "^a is in m.*expected a number without a unit: it is multiplied"),
        (lambda x, m: subquad.linear_scan(x, x, initial_state=m[:, 0]), "^initial_state is in m.*h has the unit of b"),
        (lambda x, m: subquad.linear_scan(x, m, initial_state=x[:, 0]), "^initial_state is in no unit.*h has the unit of b"),
        (lambda x, m: subquad.selective_scan(m, x, -np.ones((4, 3)), x, x), "^u is a quantity of .*attention and linear_scan carry"),
        (lambda x, m: subquad.Linear().summarize(x, m), "^v is a quantity of .*pass numbers in a unit that you choose, such as x"),
    ],
)  # fmt: skip
def test_misfits(package: Any, call: Any, message: str) -> None:
    x = drawn()[0]
    with pytest.raises(TypeError, match=message):
        call(x, package.quantity(x, "m"))


def test_scales_without_a_zero() -> None:
    """A mean of temperatures in °C is one; their sum is not, and a scan refuses them where the package does."""
    x = drawn()[0]
    for package in (Pint(), Unyt()):
        celsius = package.quantity(x, "degC")
        out = subquad.attention(x, x, celsius, "exact")
        assert relative_error(package.numbers(out, "degC"), subquad.attention(x, x, x, "exact")) <= 3e-15
        with pytest.raises(TypeError, match=r"^b is in .*of which \w+ forms no multiples"):
            subquad.linear_scan(x, celsius)


def test_two_packages() -> None:
    """The unit of v is that of its package, whatever package the others are of."""
    pint, astropy = Pint(), Astropy()
    x = drawn()[0]
    out = subquad.attention(pint.quantity(x, "m"), pint.quantity(x, "1/m"), astropy.quantity(x, "s"), "exact")
    assert relative_error(astropy.numbers(out, "s"), subquad.attention(x, x, x, "exact")) <= 3e-15


def test_pint_around_another_library() -> None:
    da, pint = pytest.importorskip("dask.array"), Pint()
    x = drawn()[0]
    lazy = pint.quantity(da.from_array(x, chunks=(1, 10, 4)), "m")
    out = subquad.linear_scan(da.from_array(x / 4), lazy)
    assert isinstance(out.magnitude, da.Array)
    assert relative_error(pint.numbers(out, "m").compute(), subquad.linear_scan(x / 4, x)) <= 3e-15
