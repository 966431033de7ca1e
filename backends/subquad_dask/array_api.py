"""The namespace of Dask: that of the compatibility layer, with what it lacks."""

from __future__ import annotations

from functools import partial
from typing import Any

from array_api_compat.dask import array as compat

from subquad.chunks import single
from subquad_dask.blocks import BLOCKS


def __getattr__(name: str) -> Any:
    return getattr(compat, name)


def reshape(x: Any, shape: Any, **options: Any) -> Any:
    """The array in another shape; where Dask cannot for these chunks, axes that change are put together first."""
    try:
        return compat.reshape(x, shape, **options)
    except NotImplementedError:
        return single.reshape(BLOCKS, x, shape)


def zeros(shape: tuple[int, ...], **options: Any) -> Any:
    """An array of 0; one without an element has one chunk, for which Dask's own choice may divide by 0."""
    return compat.zeros(shape, **options, **({"chunks": shape} if 0 in shape else {}))


take_along_axis = partial(single.take_along_axis, BLOCKS)
linalg = single.linalg(BLOCKS)
