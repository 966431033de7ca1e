"""CuPy backend: arrays that are filled in place, and the CUDA selective scan. The import needs no device."""

from __future__ import annotations

from typing import Any

from subquad.backend import Backend, Override
from subquad.kernels.selective_scan import Inputs
from subquad_cupy.selective_scan import calls


def _selective_scan(*arrays: Any, delta_softplus: bool, reverse: bool) -> tuple[Any, Any]:
    y, state, _ = calls.scan_forward(Inputs(*arrays), delta_softplus=delta_softplus, reverse=reverse)
    return y, state


class CupyBackend(Backend):
    """CuPy computes at once, on the device of the arrays."""

    library = "cupy"
    overrides = (Override("selective_scan", "rawkernel", _selective_scan, calls.ACCEPTS),)
    fills_in_place = True

    def device_kind(self, array: Any) -> str:
        """The kind "cuda", of every CuPy array."""
        return "cuda"


BACKEND = CupyBackend()
