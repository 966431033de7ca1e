"""Dask backend: features and recurrences as a few tasks for each chunk of the sequence, which run on its blocks."""

from __future__ import annotations

import math
from types import ModuleType

import dask.array as da

from subquad.backend import Array
from subquad.chunks import ChunkedBackend, overrides
from subquad_dask import array_api
from subquad_dask.blocks import BLOCKS


class DaskBackend(ChunkedBackend):
    """Dask: lazy arrays in chunks."""

    library = "dask"
    _blocks, overrides = BLOCKS, overrides(BLOCKS)

    def namespace(self, array: Array) -> ModuleType:
        return array_api if isinstance(array, da.Array) else super().namespace(array)

    def refuses(self, array: Array) -> str | None:
        if not any(math.isnan(size) for size in array.shape):
            return None
        return "a dask array whose chunks have unknown sizes; call its method compute_chunk_sizes() first"


BACKEND = DaskBackend()
