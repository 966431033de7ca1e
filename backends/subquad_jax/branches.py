"""A condition that stays one branch under `vmap`, where JAX would compute both, and that works in `shard_map`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from subquad_jax import shard_types


def where_any(condition: Any, change: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """`change(*given)` if the condition holds, else `given`.

    The gradient of `change` computes intermediate results again, and saves none. Under `vmap` all items of the batch
    are changed if the condition holds for any.
    """

    def changed(*given: Any) -> tuple[Any, ...]:
        return tuple(jax.checkpoint(change)(*given))

    def kept(*given: Any) -> tuple[Any, ...]:
        return given

    return either(condition, changed, kept, given)


def either(condition: Any, one: Callable[..., Any], other: Callable[..., Any], given: tuple[Any, ...] = ()) -> Any:
    """`one(*given)` if the condition holds, else `other(*given)`; under `vmap`, one choice for all items."""
    branches = [one, other]
    if shard_types.inside():  # where both branches must have one type
        axes = frozenset[Any]().union(*(shard_types.axes_of(jax.eval_shape(f, *given)) for f in branches))
        branches = [lambda *x, f=f: shard_types.vary(f(*x), axes) for f in branches]
    return jax.lax.cond(_anywhere(condition), *branches, *given)


@jax.custom_batching.custom_vmap
def _anywhere(condition: Any) -> Any:
    """The condition itself; under `vmap`, one condition for the whole batch: whether it holds for any item."""
    return condition


@_anywhere.def_vmap
def _anywhere_in_batch(size: int, batched: Any, condition: Any) -> tuple[Any, bool]:
    return _anywhere(jnp.any(condition, axis=0)), False
