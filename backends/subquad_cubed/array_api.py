"""The namespace of Cubed, where the place of a new array is a Spec: arrays of one computation share it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from cubed import array_api
from cubed.array_api import *  # noqa: F403


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


def concat(arrays: Any, /, *, axis: int | None = 0) -> Any:
    """Arrays one after the other along an axis, which Cubed wants counted from the front."""
    return array_api.concat(arrays, axis=axis if axis is None else axis % arrays[0].ndim)


def reshape(x: Any, /, shape: Any, *, copy: bool | None = None) -> Any:
    """The array in another shape, where Cubed can bring its chunks into it."""
    try:
        return array_api.reshape(x, shape)
    except (ValueError, NotImplementedError) as error:
        msg = (
            f"cubed cannot reshape {x.shape} in chunks of {x.chunksize} to {tuple(shape)}, which this method needs; "
            f"take another, or other chunks"
        )
        raise NotImplementedError(msg) from error
