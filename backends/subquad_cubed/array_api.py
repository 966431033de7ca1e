"""The namespace of Cubed, where the place of a new array is a Spec: arrays of one computation share it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from cubed import array_api
from cubed.array_api import *  # noqa: F403

from subquad.chunks import single
from subquad.core.beside import namespace_of
from subquad_cubed.blocks import BLOCKS


class MissingError(NotImplementedError, AttributeError):
    """That Cubed has no such function."""


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    msg = f"cubed has no {name}, which this method needs; take another, or compute the arrays"
    raise MissingError(msg)


def _beside(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def make(*args: Any, device: Any = None, **options: Any) -> Any:
        return function(*args, spec=device, **options)

    return make


def _like(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def make(*args: Any, device: Any = None, **options: Any) -> Any:
        return function(*args, **options)  # beside the array that it is like

    return make


arange, asarray, empty, eye, full, linspace, ones, zeros = (
    _beside(getattr(array_api, name))
    for name in ("arange", "asarray", "empty", "eye", "full", "linspace", "ones", "zeros")
)
empty_like, full_like, ones_like, zeros_like = (
    _like(getattr(array_api, name)) for name in ("empty_like", "full_like", "ones_like", "zeros_like")
)


def _from_the_front(function: Callable[..., Any]) -> Callable[..., Any]:
    # Cubed counts the axis from the front, and takes another axis for a negative number
    @wraps(function)
    def run(x: Any, /, *args: Any, axis: int | None = 0, **options: Any) -> Any:
        first = x[0] if isinstance(x, list | tuple) else x
        return function(x, *args, axis=axis if axis is None else axis % first.ndim, **options)

    return run


concat, repeat = map(_from_the_front, (array_api.concat, array_api.repeat))


def reshape(x: Any, /, shape: Any, *, copy: bool | None = None) -> Any:
    """The array in another shape; where Cubed cannot for these chunks, axes that change are put together first."""
    try:
        return array_api.reshape(x, shape)
    except (ValueError, NotImplementedError):
        return single.reshape(BLOCKS, x, shape)


def argsort(x: Any, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Any:
    """The order of the entries along an axis, which is put into one chunk."""

    def order(block: Any, at: int) -> Any:
        return namespace_of(block).argsort(block, axis=at, descending=descending, stable=stable)

    return single.along_axis(BLOCKS, order, x, axis, array_api.int64)


# of indices that are not sorted, or not distinct, Cubed takes others
take = partial(single.take, BLOCKS)
take_along_axis = partial(single.take_along_axis, BLOCKS)
linalg = single.linalg(BLOCKS)
del linalg.eigh  # to plan "clustered", which needs it, takes Cubed minutes
