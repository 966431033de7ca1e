"""Pint backend: attention and linear scans carry the units of quantities."""

from __future__ import annotations

import pint

from subquad.core.quantities import Quantities, Units

BACKEND = Quantities(
    Units(
        package="pint",
        kind=pint.Quantity,
        one=pint.Unit(""),
        advice='such as x.to("m").magnitude, or x.to_base_units().magnitude',
        of=lambda x: x.units,
        numbers=lambda x, unit: x.m_as(unit),
        quantity=pint.Quantity,
    )
)
