"""The namespace of Dask: that of the compatibility layer, with what it lacks."""

from __future__ import annotations

from typing import Any

import dask.array as da
from array_api_compat.dask import array as compat

from subquad.core.beside import namespace_of


def __getattr__(name: str) -> Any:
    return getattr(compat, name)


def reshape(x: Any, shape: Any, **options: Any) -> Any:
    """The array in another shape; where Dask cannot for these chunks, it is put together first."""
    try:
        return compat.reshape(x, shape, **options)
    except NotImplementedError:
        return compat.reshape(x.rechunk(-1), shape, **options)


def take_along_axis(x: Any, indices: Any, *, axis: int = -1) -> Any:
    """The entries with these numbers along an axis, line by line; the axis is put into one chunk."""
    at = axis % x.ndim
    shape = [max(pair) for pair in zip(x.shape, indices.shape, strict=True)]
    pairs = [da.broadcast_to(y, tuple(y.shape[i] if i == at else n for i, n in enumerate(shape))) for y in (x, indices)]
    cut, x = pairs[1].rechunk({at: -1}), pairs[0]
    x = x.rechunk(tuple(-1 if i == at else chunks for i, chunks in enumerate(cut.chunks)))
    return da.map_blocks(_taken, x, cut, axis=at, dtype=x.dtype, chunks=cut.chunks)


def _taken(x: Any, indices: Any, *, axis: int) -> Any:
    return namespace_of(x).take_along_axis(x, indices, axis=axis)
