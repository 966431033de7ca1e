"""Dask backend: features and recurrences as a few tasks for each chunk of the sequence, which run on its blocks."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import dask.array as da

from subquad.backend import Array, Backend
from subquad.chunks import overrides
from subquad.chunks.blocks import with_new_axes
from subquad_dask import array_api
from subquad_dask.blocks import BLOCKS


class DaskBackend(Backend):
    """Dask: lazy arrays in chunks."""

    library = "dask"
    overrides = overrides(BLOCKS)

    def namespace(self, array: Array) -> ModuleType:
        return array_api if isinstance(array, da.Array) else super().namespace(array)

    def is_concrete(self, *arrays: Array | None) -> bool:
        """False: to read a value is to compute the graph."""
        return all(x is None for x in arrays)

    def reshaped(self, xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
        """New axes of length 1 join the task that makes the chunk; a reshape is one of its own."""
        longer = with_new_axes(BLOCKS, x, shape)
        return super().reshaped(xp, x, shape) if longer is None else longer

    def refuses(self, array: Array) -> str | None:
        if not any(math.isnan(size) for size in array.shape):
            return None
        return "a dask array whose chunks have unknown sizes; call its method compute_chunk_sizes() first"


BACKEND = DaskBackend()
