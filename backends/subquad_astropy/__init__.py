"""Astropy backend: attention and linear scans carry the units of quantities."""

from __future__ import annotations

from typing import Any

from astropy import units

from subquad.core.quantities import Quantities, Units


class Astropy(Units):
    """Astropy: arrays of NumPy with a unit."""

    package = "astropy"
    kind = units.Quantity
    one = units.dimensionless_unscaled
    advice = "such as x.to_value('m'), or x.si.value"

    def of(self, x: Any) -> Any:
        return x.unit

    def numbers(self, x: Any, unit: Any) -> Any:
        return x.to_value(unit)

    def quantity(self, numbers: Any, unit: Any) -> Any:
        return numbers * unit if isinstance(numbers, float) else numbers << unit


BACKEND = Quantities(Astropy())
