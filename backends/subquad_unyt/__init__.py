"""Unyt backend: attention and linear scans carry the units of quantities."""

from __future__ import annotations

import unyt

from subquad.core.quantities import Quantities, Units

BACKEND = Quantities(
    Units(
        package="unyt",
        kind=unyt.unyt_array,
        one=unyt.dimensionless,
        advice="such as x.to_value('m'), or x.in_mks().value",
        of=lambda x: x.units,
        numbers=lambda x, unit: x.to_value(unit),
        quantity=unyt.unyt_array,
    )
)
