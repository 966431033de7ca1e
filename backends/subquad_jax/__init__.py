"""JAX backend: loops that stay loops under tracing, JAX's own attention, compiled CPU kernels; reversible layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from subquad.backend import Backend, Conditions
from subquad.core.block_loop import loop_blocks, row_count, take_rows
from subquad_jax import adapt, branches, dot_product_attention, programs, shard_types
from subquad_jax.batch_axes import in_forward_mode, items_behind
from subquad_jax.reversible import reversible as reversible
from subquad_jax.reversible import reversible_sequence as reversible_sequence
from subquad_numpy.table import COMPILED


class JaxBackend(Backend):
    """JAX: arrays that are computed at once or traced, and are never written in place."""

    library = "jax"
    overrides = (
        dot_product_attention.OVERRIDE,
        *(adapt.as_override(compiled) for compiled in COMPILED.values() if compiled.launch is not None),
    )

    def namespace(self, array: Any) -> ModuleType:
        return jnp if isinstance(array, jax.Array) else super().namespace(array)

    def device_of(self, array: Any) -> Any:
        """The device of an array; the set of its devices if it is sharded over several; None for a tracer."""
        if isinstance(array, jax.core.Tracer):
            return None
        devices = array.devices()
        return devices if len(devices) > 1 else next(iter(devices))

    def place_of(self, array: Any) -> Any:
        """The device of an array; None if it is sharded over several: new arrays of other shapes fit any sharding."""
        where = self.device_of(array)
        return None if isinstance(where, set) else where

    def computing(self, like: Any) -> AbstractContextManager[Any]:
        """A context of the highest precision of products, which JAX may otherwise take in bfloat16 or TF32."""
        return programs.PRECISE()

    def conditions(self, arrays: Sequence[Any]) -> Conditions:
        """The conditions of a call: whether it is traced, and differentiated in forward mode."""
        return Conditions(tracing=not self.is_concrete(*arrays), tangents=any(map(in_forward_mode, arrays)))

    def device_kind(self, array: Any) -> str:
        """The platform of the array's devices; for a tracer, JAX's default platform."""
        if isinstance(array, jax.core.Tracer):
            return jax.default_backend()
        return next(iter(array.devices())).platform

    def is_concrete(self, *arrays: Any) -> bool:
        """Whether values can be read, that is, none of the arrays is a tracer."""
        return not any(isinstance(x, jax.core.Tracer) for x in arrays)

    def items_behind(self, *arrays: Any) -> int:
        """The product of the sizes of the axes that `vmap` hides; what is jitted inside of a `vmap` does not tell."""
        return max(map(items_behind, arrays), default=1)

    def as_program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function under `jax.jit`: without it every operation would be dispatched alone."""
        return jax.jit(function)

    def constant(self, x: Any) -> Any:
        return jax.lax.stop_gradient(x)

    def where_any(self, condition: Any, change: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        """`change(*given)` where the condition holds, else `given`, by `lax.cond`."""
        return branches.where_any(condition, change, given)

    def fold_blocks(
        self, step: Callable[..., Any], carry: Any, arrays: Sequence[Any], size: int, *, exact: bool = False
    ) -> tuple[Any, Any]:
        """`lax.scan` over blocks while tracing, so that compile time does not grow with n; else the Python loop."""
        n = row_count(arrays)
        if n <= size or self.is_concrete(*arrays, *jax.tree.leaves(carry)):
            return loop_blocks(step, carry, arrays, size)
        whole = n // size

        def body(carry: Any, block: Any) -> tuple[Any, Any]:
            cut = [
                None if x is None else jax.lax.dynamic_slice_in_dim(x, block * size, size, axis=x.ndim - 2)
                for x in arrays
            ]
            return step(carry, *cut)

        if shard_types.inside():  # the carry must have one type in all steps: that of the carry after a step
            carry = shard_types.vary(carry, shard_types.axes_of(jax.eval_shape(body, carry, 0)[0]))
        carry, out = jax.lax.scan(body, carry, jnp.arange(whole))
        if out is not None:
            out = jnp.moveaxis(out, 0, -3)  # (blocks, …, size, d_v) → (…, blocks, size, d_v)
            out = out.reshape(*out.shape[:-3], whole * size, out.shape[-1])
        if whole * size < n:
            carry, rest = step(carry, *take_rows(arrays, whole * size, n))
            out = rest if out is None else jnp.concatenate([out, rest], axis=-2)
        return carry, out


BACKEND = JaxBackend()
