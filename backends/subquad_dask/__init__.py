"""Dask backend: features and recurrences as a few tasks for each chunk of the sequence, which run on its blocks."""

from __future__ import annotations

import math
from typing import Any

from subquad.backend import Accepts, Array, Backend, Call, Override
from subquad_dask.chunks import with_new_axes
from subquad_dask.features import feature_attend, feature_step, feature_summarize
from subquad_dask.scans import linear_scan, selective_scan

REAL = ("float32", "float64")
ALL = (*REAL, "complex64", "complex128")


def is_empty(call: Call) -> str | None:
    """A reason to decline: an array without entries has no chunks to compute."""
    return "an array has no entries" if any(x is not None and 0 in x.shape for x in call.arrays) else None


def accepts(*options: str, dtypes: tuple[str, ...] = REAL, one_dtype: bool = True) -> Accepts:
    """The calls that are computed chunk by chunk: those with entries, of dtypes that are not widened."""
    return Accepts(dtypes=dtypes, one_dtype=one_dtype, devices=(), options=frozenset(options), also=is_empty)


class DaskBackend(Backend):
    """Dask: lazy arrays in chunks."""

    library = "dask"
    overrides = (
        Override("feature_summarize", "chunks", feature_summarize, accepts("key_mask")),
        Override("feature_attend", "chunks", feature_attend, accepts()),
        Override("feature_step", "chunks", feature_step, accepts("key_mask")),
        Override("selective_scan", "chunks", selective_scan, accepts(dtypes=ALL, one_dtype=False)),
        Override("linear_scan", "chunks", linear_scan, accepts(dtypes=ALL)),
    )

    def is_concrete(self, *arrays: Array | None) -> bool:
        """False: to read a value is to compute the graph."""
        return all(x is None for x in arrays)

    def reshaped(self, xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
        """New axes of length 1 join the task that makes the chunk; a reshape is one of its own."""
        longer = with_new_axes(x, shape)
        return super().reshaped(xp, x, shape) if longer is None else longer

    def refuses(self, array: Array) -> str | None:
        if not any(math.isnan(size) for size in array.shape):
            return None
        return "a dask array whose chunks have unknown sizes; call its method compute_chunk_sizes() first"


BACKEND = DaskBackend()
