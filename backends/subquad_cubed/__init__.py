"""Cubed backend: features and recurrences chunk by chunk, in bounded memory; constants beside arrays of any Spec."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import cubed

from subquad.backend import Array, Backend
from subquad.chunks import overrides
from subquad.chunks.blocks import with_new_axes
from subquad_cubed import array_api
from subquad_cubed.blocks import BLOCKS


class CubedBackend(Backend):
    """Cubed: lazy arrays in chunks, which are read from and written to storage."""

    library = "cubed"
    overrides = overrides(BLOCKS)

    def namespace(self, array: Array) -> ModuleType:
        return array_api if isinstance(array, cubed.Array) else super().namespace(array)

    def place_of(self, array: Array) -> Any:
        """The Spec, which is one for all arrays of a computation."""
        return array.spec

    def device_of(self, array: Array) -> str:
        return "cpu"

    def is_concrete(self, *arrays: Array | None) -> bool:
        """False: to read a value is to run the computation."""
        return all(x is None for x in arrays)

    def reshaped(self, xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
        longer = with_new_axes(BLOCKS, x, shape)
        return super().reshaped(xp, x, shape) if longer is None else longer


BACKEND = CubedBackend()
