"""Astropy backend: attention and linear scans carry the units of quantities."""

from __future__ import annotations

from astropy import units

from subquad.core.quantities import Quantities, Units

BACKEND = Quantities(
    Units(
        package="astropy",
        kind=units.Quantity,
        one=units.dimensionless_unscaled,
        advice="such as x.to_value('m'), or x.si.value",
        of=lambda x: x.unit,
        numbers=lambda x, unit: x.to_value(unit),
        quantity=lambda x, unit: x * unit if isinstance(x, float) else x << unit,
    )
)
