"""Unyt backend: attention and linear scans carry the units of quantities."""

from __future__ import annotations

from typing import Any

import unyt

from subquad.core.quantities import Quantities, Units


class Unyt(Units):
    """Unyt: arrays of NumPy with a unit."""

    package = "unyt"
    kind = unyt.unyt_array
    one = unyt.dimensionless
    advice = "such as x.to_value('m'), or x.in_mks().value"

    def of(self, x: Any) -> Any:
        return x.units

    def numbers(self, x: Any, unit: Any) -> Any:
        return x.to_value(unit)

    def quantity(self, numbers: Any, unit: Any) -> Any:
        return unyt.unyt_array(numbers, unit)


BACKEND = Quantities(Unyt())
