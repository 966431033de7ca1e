"""Kernels under `vmap`: where batch axes broadcast, arrays get one more batch axis and the kernel runs once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Arrays = tuple[Array | None, ...]
Function = Callable[..., tuple[Array, ...]]


def wrappers(x: Any) -> Iterator[Any]:
    """The tracers of transforms around an array, from the innermost transform on."""
    while isinstance(x, jax.core.Tracer):
        yield x
        x = x.val if hasattr(x, "batch_dim") else getattr(x, "primal", None)


def items_behind(x: Any) -> int:
    """The product of the sizes of the axes of an array that `vmap` hides."""
    axes = ((y.val, y.batch_dim) for y in wrappers(x) if isinstance(getattr(y, "batch_dim", None), int))
    return math.prod(batch.shape[axis] for batch, axis in axes)


def in_forward_mode(x: Any) -> bool:
    """Whether an array carries a tangent of `jax.jvp`.

    JAX versions that linearise by tangents too, for reverse mode, cannot tell: the answer is then False.
    """
    tells = getattr(jax.config, "jax_use_direct_linearize", False)
    return tells and any(type(y).__name__ == "JVPTracer" for y in wrappers(x))


def with_batch_axes(function: Function, generic: Function, own_axes: Callable[[int, int], int]) -> Function:
    """`function` with a rule for `vmap`, for arrays that broadcast in their first axes.

    The last `own_axes(i, count)` axes of array i, of `count` arrays, are not batch axes. If the generic form does not
    take one more axis of some array, items are run one after the other.
    """

    @jax.custom_batching.custom_vmap
    def mapped(*arrays: Array | None) -> tuple[Array, ...]:
        return function(*arrays)

    @mapped.def_vmap
    def rule(size: int, batched: Sequence[Any], *arrays: Array | None) -> tuple[Any, Any]:
        axes = [own_axes(i, len(arrays)) for i in range(len(arrays))]
        folded = _aligned(arrays, batched, axes)
        shapes = _result_shapes(generic, size, batched, arrays, folded)
        if shapes is not None:
            found = tuple(x.reshape(shape) for x, (shape, _) in zip(mapped(*folded), shapes, strict=True))
            return found, tuple(own for _, own in shapes)

        def item(own: Arrays) -> tuple[Array, ...]:
            rest = iter(own)
            return mapped(*(next(rest) if mine else x for x, mine in zip(arrays, batched, strict=True)))

        found = jax.lax.map(item, tuple(x for x, mine in zip(arrays, batched, strict=True) if mine))
        return found, tuple(True for _ in found)

    return mapped


def gradient_with_batch_axes(function: Callable[..., Any], has_key_mask: bool) -> Callable[..., Any]:
    """A gradient with a rule for `vmap`; its arguments (arrays, outputs, grads) have batch axes that broadcast.

    Each item of the batch wants a gradient of its own, so that an array that all items share is repeated.
    """

    @jax.custom_batching.custom_vmap
    def mapped(arrays: Arrays, outputs: Arrays, grads: Arrays) -> Arrays:
        return function(arrays, outputs, grads)

    @mapped.def_vmap
    def rule(size: int, batched: Any, *given: Arrays) -> tuple[Arrays, Any]:
        def repeated(x: Array, mine: bool) -> Array:
            return x if mine else jnp.broadcast_to(x, (size, *x.shape))

        own = jax.tree.map(repeated, given, tuple(batched))
        counts = [len(part) for part in own]
        flat, axes = [x for part in own for x in part], [2] * sum(counts)
        if has_key_mask:
            axes[counts[0] - 1] = 1
        folded = iter(_aligned(tuple(flat), [True] * len(flat), axes))
        found = mapped(*(tuple(next(folded) for _ in range(count)) for count in counts))
        grads = tuple(None if by is None else by.reshape(x.shape) for by, x in zip(found, own[0], strict=True))
        return grads, jax.tree.map(lambda _: True, grads)

    return mapped


def _aligned(arrays: Arrays, batched: Sequence[Any], axes: Sequence[int]) -> Arrays:
    """The arrays with the new axis first, then as many axes of length 1 as let the other batch axes broadcast."""
    ranks = [0 if x is None else x.ndim - own - bool(mine) for x, mine, own in zip(arrays, batched, axes, strict=True)]
    return tuple(
        x.reshape(x.shape[0], *[1] * (max(ranks) - rank), *x.shape[1:]) if x is not None and mine else x
        for x, mine, rank in zip(arrays, batched, ranks, strict=True)
    )


def _result_shapes(
    generic: Function, size: int, batched: Sequence[Any], arrays: Arrays, folded: Arrays
) -> list[tuple[tuple[int, ...], bool]] | None:
    """(shape, has the new axis) of each result; None where the generic form does not take arrays with the new axis."""
    items = [
        jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if x is not None and mine else x
        for x, mine in zip(arrays, batched, strict=True)
    ]
    try:
        given = jax.eval_shape(generic, *folded)
    except (TypeError, ValueError):
        return None
    shapes = []
    for x, item in zip(given, jax.eval_shape(generic, *items), strict=True):
        own = math.prod(x.shape) == size * math.prod(item.shape)
        if not own and math.prod(x.shape) != math.prod(item.shape):
            return None
        shapes.append(((size, *item.shape) if own else item.shape, own))
    return shapes
