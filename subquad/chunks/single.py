"""Functions for which an axis must be in one chunk: sorting and gathering along it, decompositions, any other shape.

Axes that a function does not mix stay in chunks; the others are put together, so that a task needs memory for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from subquad.backend import Array
from subquad.chunks.blocks import Blocks, whole
from subquad.core.beside import namespace_of


def take_along_axis(blocks: Blocks, x: Array, indices: Array, *, axis: int = -1) -> Array:
    """The entries with these numbers along an axis, line by line."""
    at = axis % x.ndim
    names = tuple(f"a{i}" for i in range(x.ndim))
    index = (*names[:at], "found", *names[at + 1 :])
    pairs = blocks.aligned([(blocks.together(x, [at]), names), (blocks.together(indices, [at]), index)])

    def take(_: int, block: Any, found: Any) -> Any:
        return namespace_of(block).take_along_axis(block, found, axis=at)

    return blocks.run(take, index, pairs, sizes={}, rows=0, dtype=x.dtype)


def take(blocks: Blocks, x: Array, indices: Array, *, axis: int = 0) -> Array:
    """The entries with these numbers (count,) along an axis."""
    at = axis % x.ndim
    names = tuple(f"a{i}" for i in range(x.ndim))

    def some(_: int, block: Any, found: Any) -> Any:
        return namespace_of(block).take(block, found, axis=at)

    pairs = [(blocks.together(x, [at]), names), (indices, ("found",))]
    return blocks.run(some, (*names[:at], "found", *names[at + 1 :]), pairs, sizes={}, rows=0, dtype=x.dtype)


def along_axis(blocks: Blocks, function: Callable[[Any, int], Any], x: Array, axis: int, dtype: Any) -> Array:
    """`function(block, axis)` of whole lines along an axis, in the shape of `x`."""
    at = axis % x.ndim
    names = tuple(f"a{i}" for i in range(x.ndim))
    return blocks.run(
        lambda _, block: function(block, at), names, [(blocks.together(x, [at]), names)], sizes={}, rows=0, dtype=dtype
    )


def reshape(blocks: Blocks, x: Array, shape: Sequence[int]) -> Array:
    """The entries in another shape, of which one size may be −1; first axes that are equal stay in chunks."""
    left = math.prod(x.shape) // max(1, math.prod(size for size in shape if size != -1))
    shape = [left if size == -1 else size for size in shape]
    same = 0
    while same < min(x.ndim, len(shape)) and x.shape[same] == shape[same]:
        same += 1
    names, rest = tuple(f"a{i}" for i in range(x.ndim)), shape[same:]
    new = {f"new{i}": size for i, size in enumerate(rest)}

    def change(_: int, block: Any) -> Any:
        return namespace_of(block).reshape(block, (*block.shape[:same], *rest))

    pairs = [(blocks.together(x, range(same, x.ndim)), names)]
    return blocks.run(change, (*names[:same], *new), pairs, sizes=new, rows=0, dtype=x.dtype)


def linalg(blocks: Blocks) -> SimpleNamespace:
    """What `decomposition` looks for: functions of small matrices (..., m, m), each in one chunk."""

    def of_matrices(function: Callable[..., Any], *arrays: Array, kept: int = 2) -> Array:
        # in the shape of the last array, or without the last axis of it
        pairs: Any = blocks.aligned([whole(blocks, x, 2) for x in arrays])  # type: ignore[misc]
        index = pairs[-1][1]

        def call(_: int, *found: Any) -> Any:
            return function(namespace_of(found[0]).linalg, *found)

        index = index[: len(index) - 2 + kept]
        return blocks.run(call, index, pairs, sizes={}, rows=0, dtype=arrays[-1].dtype)

    return SimpleNamespace(
        eigh=lambda a: tuple(of_matrices(lambda of, x, i=i: of.eigh(x)[i], a, kept=1 + i) for i in (0, 1)),
        pinv=lambda a, *, rtol: of_matrices(lambda of, x: of.pinv(x, rtol=rtol), a),
        solve=lambda a, b: of_matrices(lambda of, x, y: of.solve(x, y), a, b),
    )
