"""JAX backend: loops that stay loops under tracing, and JAX's own attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from subquad._blocks import loop_blocks, rows, take_rows
from subquad._dispatch import Override
from subquad_jax import _attention, _linear_scan, _scan, _varying

KERNELS = {
    "softmax_attention": (Override("dot_product_attention", _attention.softmax_attention, _attention.declines),),
    "linear_scan": (Override("numba", _linear_scan.linear_scan, _linear_scan.declines),),
    "selective_scan": (Override("numba", _scan.selective_scan, _scan.declines),),
}


def concrete(*arrays: Any) -> bool:
    """Can values be read, i.e. is none of the arrays a tracer?"""
    return not any(isinstance(x, jax.core.Tracer) for x in arrays)


def cond(predicate: Any, function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """`function(*given)` where the predicate is true, else `given`; what its gradient needs is computed again."""
    return jax.lax.cond(predicate, jax.checkpoint(function), lambda *same: same, *given)


def scan_blocks(
    step: Callable[..., tuple[Any, Any]],
    carry: Any,
    arrays: Sequence[Any],
    size: int,
    *,
    exact: bool = False,
) -> tuple[Any, Any]:
    """`lax.scan` over blocks while tracing, so that compile time does not grow with n; the Python loop otherwise."""
    n = rows(arrays)
    if n <= size or concrete(*arrays, *jax.tree.leaves(carry)):
        return loop_blocks(step, carry, arrays, size, xp=jnp)
    whole = n // size

    def body(carry: Any, block: Any) -> tuple[Any, Any]:
        cut = [
            None if x is None else jax.lax.dynamic_slice_in_dim(x, block * size, size, axis=x.ndim - 2) for x in arrays
        ]
        return step(carry, *cut)

    if jax.sharding.get_abstract_mesh().manual_axes:  # inside `shard_map`, where the types of a carry must not change
        carry = _varying.vary(carry, _varying.axes_of(jax.eval_shape(body, carry, 0)[0]))
    carry, out = jax.lax.scan(body, carry, jnp.arange(whole))
    if out is not None:
        out = jnp.moveaxis(out, 0, -3)
        out = out.reshape(*out.shape[:-3], whole * size, out.shape[-1])
    if whole * size < n:
        carry, rest = step(carry, *take_rows(arrays, whole * size, n))
        out = rest if out is None else jnp.concatenate([out, rest], axis=-2)
    return carry, out
