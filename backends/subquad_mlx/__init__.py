"""MLX backend: the array namespace, and what lazy arrays need."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import mlx.core as mx

from subquad.backend import Array, Backend
from subquad_mlx import array_api


class MlxBackend(Backend):
    """MLX: arrays that are computed when they are read, and have no device of their own."""

    library = "mlx"

    def namespace(self, array: Array) -> ModuleType:
        return array_api if isinstance(array, mx.array) else super().namespace(array)

    def device_of(self, array: Array) -> None:
        """None: an operation has a device, an array has none."""
        return

    def device_kind(self, array: Array) -> str:
        return "cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu"

    def is_concrete(self, *arrays: Array | None) -> bool:
        """Whether values can be read, which computes them: not under ``mx.compile`` or ``mx.vmap``."""
        try:
            mx.eval([x for x in arrays if isinstance(x, mx.array)])
        except ValueError:
            return False
        return True

    def constant(self, x: Any) -> Any:
        return mx.stop_gradient(x)


BACKEND = MlxBackend()
