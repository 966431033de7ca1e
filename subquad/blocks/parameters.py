"""Parameters of a block: a mapping from the keys of a checkpoint to arrays, and what blocks compute with them."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from subquad.backend import Array
from subquad.core.spelling import nearest


def take_parameters(params: Any, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Array | None]:
    """The arrays by key, None for an optional one that is absent.

    TypeError if `params` is no mapping, ValueError for a key that is missing or unknown.
    """
    if not isinstance(params, Mapping):
        msg = f"params is a {type(params).__name__}, expected a dict from the keys of a checkpoint to arrays"
        raise TypeError(msg)
    for name in params:
        if name not in required and name not in optional:
            msg = f"params holds {name!r}; {nearest(str(name), (*required, *optional))}"
            raise ValueError(msg)
    missing = [name for name in required if params.get(name) is None]
    if missing:
        msg = f"params lacks {', '.join(map(repr, missing))}; a checkpoint's prefix must be cut off its keys"
        raise ValueError(msg)
    return {name: params.get(name) for name in (*required, *optional)}


def check_shapes(arrays: Mapping[str, Array | None], shapes: Mapping[str, tuple[int, ...]], why: str) -> None:
    """Raise ValueError unless each array that is given has its shape."""
    for name, shape in shapes.items():
        x = arrays[name]
        if x is not None and tuple(x.shape) != shape:
            msg = f"params[{name!r}] has shape {tuple(x.shape)}, expected {shape}: {why}"
            raise ValueError(msg)


def project(xp: ModuleType, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x weightᵀ + bias of x (batch, n, ·), as one product of two matrices."""
    batch, n, width = x.shape
    out = xp.reshape(x, (batch * n, width)) @ xp.matrix_transpose(weight)
    if bias is not None:
        out = out + bias
    return xp.reshape(out, (batch, n, weight.shape[0]))
