"""Compiled NumPy kernels under JAX: XLA calls them without leaving the program. No kernel has code of its own here.

A kernel whose gradient is compiled too keeps it, by `jax.custom_vjp`; differentiated again it is the generic form, or
what the kernel itself says of its gradient. Of any other, every derivative is that of the generic form. Under `vmap` a
kernel whose arrays have batch axes gets one more; others run item by item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import subquad.kernels
from subquad.backend import UNLESS_UNDER, Call, Override
from subquad.core.kernel import Kernel
from subquad_jax import conditions, shard_types
from subquad_jax.batch_axes import Arrays, Function, with_batch_axes
from subquad_numpy.compiled import Compiled

Static = tuple[tuple[str, Any], ...]
MOST_KEPT = 256  # functions, one for each kernel and its options


def as_override(compiled: Compiled) -> Override:
    """The override of a compiled kernel."""
    also = compiled.accepts.also

    def declines(call: Call) -> str | None:
        reason = None if also is None else also(call)
        return reason or conditions.declines(call, _round_trip_is_right)

    accepts = replace(compiled.accepts, under=frozenset(UNLESS_UNDER), also=declines)
    return Override(compiled.kernel, "numba", partial(run, compiled), accepts)


def run(compiled: Compiled, *arrays: Array | None, **keywords: Any) -> Any:
    """The kernel, compiled."""
    if "key_mask" in kernel_of(compiled).options:
        arrays = (*arrays, keywords.pop("key_mask", None))
    traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
    static = tuple(sorted(keywords.items()))
    found = (_transformable if traced else _plain)(compiled, static)(*arrays)
    return found[0] if len(found) == 1 else found


def _round_trip_is_right() -> bool:
    from subquad_jax import ffi

    return ffi.round_trip_is_right()


def kernel_of(compiled: Compiled) -> Kernel:
    """The kernel that is compiled."""
    return getattr(subquad.kernels, compiled.kernel)


@lru_cache(MOST_KEPT)
def _plain(compiled: Compiled, static: Static) -> Function:
    """The kernel as a program of its own: an eager call is one dispatch."""
    from subquad_jax import ffi

    def function(*arrays: Array | None) -> tuple[Array, ...]:
        assert compiled.launch is not None
        return compiled.launch(arrays, dict(static), ffi.call)

    return jax.jit(function)


@lru_cache(MOST_KEPT)
def _transformable(compiled: Compiled, static: Static) -> Function:
    """The kernel as a function that JAX may transform."""
    return _with_batch_axes(compiled, static) if compiled.launch_backward is None else _with_gradient(compiled, static)


def _generic(compiled: Compiled, static: Static) -> Function:
    """The generic form as a function of all arrays."""
    kernel = kernel_of(compiled)
    has_mask = "key_mask" in kernel.options

    def function(*arrays: Array | None) -> tuple[Array, ...]:
        *given, mask = arrays if has_mask else (*arrays, None)
        found = kernel.generic(*given, **dict(static), **({"key_mask": mask} if has_mask else {}))
        return tuple(found) if isinstance(found, tuple) else (found,)

    return function


def _with_batch_axes(compiled: Compiled, static: Static) -> Function:
    """A kernel whose derivatives, of whatever kind, are those of its generic form."""
    generic, has_mask = _generic(compiled, static), "key_mask" in kernel_of(compiled).options

    def own_axes(i: int, count: int) -> int:
        return 1 if has_mask and i == count - 1 else 2

    mapped = with_batch_axes(_plain(compiled, static), generic, own_axes)

    @jax.custom_jvp
    def function(*arrays: Array | None) -> tuple[Array, ...]:
        return mapped(*arrays)

    @function.defjvp
    def tangents(primals: Arrays, tangents: Arrays) -> Any:
        return jax.jvp(generic, primals, tangents)

    return function


def _with_gradient(compiled: Compiled, static: Static) -> Function:
    """A kernel whose first derivatives in reverse are compiled too."""
    plain, reference = _plain(compiled, static), _gradient_of_generic(compiled, static)

    @jax.custom_vjp
    def function(*arrays: Array | None) -> tuple[Array, ...]:
        return plain(*arrays)

    def forward(*arrays: Array | None) -> tuple[tuple[Array, ...], Any]:
        outputs = function(*arrays)
        read = [None if i in compiled.unread else x for i, x in enumerate((*arrays, *outputs))]
        return outputs, (tuple(read[: len(arrays)]), tuple(read[len(arrays) :]))

    def backward(saved: tuple[Arrays, Arrays], grads: tuple[Array, ...]) -> Arrays:
        return gradient(*saved, grads)

    function.defvjp(forward, backward)

    @jax.custom_vjp
    def gradient(arrays: Arrays, outputs: Arrays, grads: tuple[Array, ...]) -> Arrays:
        from subquad_jax import ffi

        assert compiled.launch_backward is not None
        # a cotangent in JAX is the conjugate of ∂/∂Re + i ∂/∂Im
        return _conj(compiled.launch_backward(arrays, dict(static), outputs, _conj(grads), ffi.call))

    def gradient_forward(*saved: Any) -> tuple[Arrays, Any]:
        return gradient(*saved), saved

    def gradient_backward(saved: Any, grads: Arrays) -> Any:
        """Derivatives of any order."""
        return jax.vjp(reference, *saved)[1](grads)

    gradient.defvjp(gradient_forward, gradient_backward)

    def typed(*arrays: Array | None) -> tuple[Array, ...]:
        # of one type, as their gradients will be: JAX sums up those of what was the same in every shard
        return function(*shard_types.vary(arrays, shard_types.axes_of(arrays)))

    return typed


def _gradient_of_generic(compiled: Compiled, static: Static) -> Callable[[Arrays, Arrays, Arrays], Arrays]:
    """The gradient in a form that can be differentiated: what the kernel says, or that of the generic form."""
    kernel, generic = kernel_of(compiled), _generic(compiled, static)

    def gradient(arrays: Arrays, outputs: Arrays, grads: Arrays) -> Arrays:
        if kernel.gradient is not None:
            return _conj(kernel.gradient(arrays, outputs, _conj(grads), **dict(static)))
        return jax.vjp(generic, *arrays)[1](grads)

    return gradient


def _conj(tree: Any) -> Any:
    return jax.tree.map(jnp.conj, tree)
