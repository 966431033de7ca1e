"""Cubed backend: features and recurrences chunk by chunk, in bounded memory; constants beside arrays of any Spec."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import cubed

from subquad.backend import Array
from subquad.chunks import ChunkedBackend, overrides
from subquad_cubed import array_api
from subquad_cubed.blocks import BLOCKS


class CubedBackend(ChunkedBackend):
    """Cubed: lazy arrays in chunks, which are read from and written to storage."""

    library = "cubed"
    _blocks, overrides = BLOCKS, overrides(BLOCKS)

    def namespace(self, array: Array) -> ModuleType:
        return array_api if isinstance(array, cubed.Array) else super().namespace(array)

    def place_of(self, array: Array) -> Any:
        """The Spec, which is one for all arrays of a computation."""
        return array.spec

    def device_of(self, array: Array) -> str:
        return "cpu"


BACKEND = CubedBackend()
