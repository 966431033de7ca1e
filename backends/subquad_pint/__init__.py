"""Pint backend: attention and linear scans carry the units of quantities."""

from __future__ import annotations

from typing import Any

import pint

from subquad.core.quantities import Quantities, Units


class Pint(Units):
    """Pint: a number or an array of any library, and a unit."""

    package = "pint"
    kind = pint.Quantity
    one = pint.Unit("")
    advice = 'such as x.to("m").magnitude, or x.to_base_units().magnitude'

    def of(self, x: Any) -> Any:
        return x.units

    def numbers(self, x: Any, unit: Any) -> Any:
        return x.m_as(unit)

    def quantity(self, numbers: Any, unit: Any) -> Any:
        return pint.Quantity(numbers, unit)


BACKEND = Quantities(Pint())
