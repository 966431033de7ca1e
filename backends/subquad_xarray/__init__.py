"""Attention and scans on DataArrays of xarray: axes are told by name, in any order, and coordinates stay.

Importing nothing of this package, `subquad.attention` refuses a DataArray and says which function takes it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from subquad.backend import Backend
from subquad_xarray.attention import attention
from subquad_xarray.scans import linear_scan, selective_scan

__all__ = ["BACKEND", "attention", "linear_scan", "selective_scan"]


class XarrayBackend(Backend):
    """DataArrays are no arrays of the standard, since they go by names of axes: functions of this package take them."""

    library = "xarray"

    def namespace(self, array: Any) -> ModuleType:
        return sys.modules[__name__]

    def refuses(self, array: Any) -> str:
        kind = type(array).__name__
        return (
            f"a {kind} of xarray, whose axes have names; call {__name__}.attention(q, k, v, method, dim=…, "
            f"feature_dim=…), {__name__}.linear_scan or {__name__}.selective_scan, or pass x.values"
        )


BACKEND = XarrayBackend()
