"""CuPy backend: arrays that are filled in place, and the CUDA scan. Importing it needs no device."""

from __future__ import annotations

from typing import Any

from subquad._dispatch import Override
from subquad.kernels.selective_scan import Inputs
from subquad_cupy import _scan

in_place = True


def _selective_scan(*arrays: Any, delta_softplus: bool, reverse: bool) -> tuple[Any, Any]:
    y, state, _ = _scan.scan_forward(Inputs(*arrays), delta_softplus=delta_softplus, reverse=reverse)
    return y, state


KERNELS = {"selective_scan": (Override("rawkernel", _selective_scan, _scan.declines),)}
