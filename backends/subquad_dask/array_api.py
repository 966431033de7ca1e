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
    if 0 in x.shape and -1 not in shape:  # Dask cannot split an axis of no element
        return zeros(shape, dtype=x.dtype)
    try:
        return compat.reshape(x, shape, **options)
    except NotImplementedError:
        return single.reshape(BLOCKS, x, shape)


def _made(name: str) -> Any:
    """A function that makes an array; without an element it has one chunk: Dask divides by 0 where it chooses."""
    make = getattr(compat, name)

    def made(shape: tuple[int, ...], *value: Any, **options: Any) -> Any:
        return make(shape, *value, **options, **({"chunks": shape} if 0 in shape else {}))

    return made


def _of_any(name: str) -> Any:
    """A reduction that also takes arrays without an element: Dask's own raises, though the axis itself has elements."""
    reduce = getattr(compat, name)

    def reduced(x: Any, /, *, axis: Any = None, keepdims: bool = False) -> Any:
        axes = range(x.ndim) if axis is None else [i % x.ndim for i in (axis if isinstance(axis, tuple) else (axis,))]
        if 0 not in x.shape or any(x.shape[i] == 0 for i in axes):
            return reduce(x, axis=axis, keepdims=keepdims)
        index = tuple((slice(1) if keepdims else 0) if i in axes else slice(None) for i in range(x.ndim))
        return x[index]

    return reduced


zeros, ones, full = _made("zeros"), _made("ones"), _made("full")
max, min = _of_any("max"), _of_any("min")  # noqa: A001  names of the standard
take_along_axis = partial(single.take_along_axis, BLOCKS)
linalg = single.linalg(BLOCKS)
