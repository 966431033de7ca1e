"""Compiled NumPy kernels under JAX, called by XLA from within a program. No kernel has code of its own here.

                              first gradient                          further derivatives
    gradient compiled         compiled, by `jax.custom_vjp`           of the kernel's `gradient`, else the generic form
    gradient not compiled     of the generic form                     of the generic form
    outputs constant          none                                    none

Under `vmap` a kernel with batch axes gets one more batch axis; the other kernels run item by item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import subquad.kernels
from subquad.backend import UNLESS_UNDER, Call, Override
from subquad.core.kernel import Kernel
from subquad_jax import branches, conditions, shard_types
from subquad_jax.batch_axes import Arrays, Function, with_batch_axes
from subquad_numpy.compiled import Compiled
from subquad_numpy.runtime.launch import Launch

Static = tuple[tuple[str, Any], ...]
PRECISE = partial(jax.default_matmul_precision, "highest")
MOST_KEPT = 256  # maximum functions kept, one for each kernel and its options


def as_override(compiled: Compiled) -> Override:
    """The override "numba" of a compiled kernel."""
    also = compiled.accepts.also

    def declines(call: Call) -> str | None:
        reason = None if also is None else also(call)
        return reason or conditions.declines(call, _round_trip_is_right)

    # a compiled gradient is one of reverse mode; `jax.custom_vjp` has no forward mode
    under = frozenset(UNLESS_UNDER) - (frozenset() if compiled.launch_backward is None else {"tangents"})
    accepts = replace(compiled.accepts, under=under, also=declines)
    return Override(compiled.kernel, "numba", partial(run, compiled), accepts)


def run(compiled: Compiled, *arrays: Array | None, **keywords: Any) -> Any:
    """The outputs of a kernel by compiled code: what the override runs."""
    if "key_mask" in kernel_of(compiled).options:
        arrays = (*arrays, keywords.pop("key_mask", None))
    if compiled.constant:
        arrays = tuple(None if x is None else jax.lax.stop_gradient(x) for x in arrays)
    traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
    static = tuple(sorted(keywords.items()))
    found = (_transformable if traced else _eager)(compiled, static)(*arrays)
    return found[0] if len(found) == 1 else found


def _round_trip_is_right() -> bool:
    from subquad_jax import ffi

    return ffi.round_trip_is_right()


def kernel_of(compiled: Compiled) -> Kernel:
    """The kernel of `subquad.kernels` that is compiled."""
    return getattr(subquad.kernels, compiled.kernel)


class InProgram:
    """A `runtime.launch.Run` whose launches become calls in a program of XLA."""

    def __call__(self, launch: Launch, operands: Mapping[str, Array | None]) -> dict[str, Array]:
        from subquad_jax import ffi

        return ffi.call(launch, operands)

    def where_any(self, condition: Array, change: Callable[..., Any], given: Arrays) -> Any:
        return branches.where_any(condition, change, given)


class FirstTry(InProgram):
    """An `InProgram` that never applies a change, but collects the conditions under which one is due.

    Its program lacks the generic form, which is rarely needed, and compiles in a fraction of the time.
    """

    def __init__(self) -> None:
        self.conditions: list[Array] = []

    def where_any(self, condition: Array, change: Callable[..., Any], given: Arrays) -> Any:
        self.conditions.append(condition)
        return given


@lru_cache(MOST_KEPT)
def _program(compiled: Compiled, static: Static) -> Function:
    """A function of the arrays that runs the kernel, changes included, as one program."""

    def function(*arrays: Array | None) -> tuple[Array, ...]:
        assert compiled.launch is not None
        return compiled.launch(arrays, dict(static), InProgram())

    return jax.jit(function)


@lru_cache(MOST_KEPT)
def _eager(compiled: Compiled, static: Static) -> Function:
    """A function of concrete arrays that runs the kernel without changes, and once more where a change is due."""

    @jax.jit
    def first_try(*arrays: Array | None) -> tuple[tuple[Array, ...], list[Array]]:
        assert compiled.launch is not None
        run = FirstTry()
        return compiled.launch(arrays, dict(static), run), run.conditions

    def function(*arrays: Array | None) -> tuple[Array, ...]:
        found, conditions = first_try(*arrays)
        # Arrays that a traced function closes over have values, but what is computed from them is a tracer: then a
        # condition cannot be read, and the program with the change must be used.
        if any(isinstance(x, jax.core.Tracer) or bool(x) for x in conditions):
            return _program(compiled, static)(*arrays)
        return found

    return function


@lru_cache(MOST_KEPT)
def _transformable(compiled: Compiled, static: Static) -> Function:
    """A function of the arrays that runs the kernel, and that JAX may transform."""
    return _with_batch_axes(compiled, static) if compiled.launch_backward is None else _with_gradient(compiled, static)


def _generic(compiled: Compiled, static: Static) -> Function:
    """The generic form as a function of all arrays, the key mask last, that returns a tuple."""
    kernel = kernel_of(compiled)
    has_mask = "key_mask" in kernel.options

    def function(*arrays: Array | None) -> tuple[Array, ...]:
        *given, mask = arrays if has_mask else (*arrays, None)
        with PRECISE():  # a rule of differentiation may be traced after the call that it belongs to
            found = kernel.generic(*given, **dict(static), **({"key_mask": mask} if has_mask else {}))
        return tuple(found) if isinstance(found, tuple) else (found,)

    return function


def _with_batch_axes(compiled: Compiled, static: Static) -> Function:
    """A function that runs the kernel, and takes all derivatives from the generic form."""
    generic, has_mask = _generic(compiled, static), "key_mask" in kernel_of(compiled).options

    def own_axes(i: int, count: int) -> int:
        return 1 if has_mask and i == count - 1 else 2

    mapped = with_batch_axes(_program(compiled, static), generic, own_axes)

    @jax.custom_jvp
    def function(*arrays: Array | None) -> tuple[Array, ...]:
        return mapped(*arrays)

    @function.defjvp
    def tangents(primals: Arrays, tangents: Arrays) -> Any:
        return jax.jvp(generic, primals, tangents)

    return function


def _with_gradient(compiled: Compiled, static: Static) -> Function:
    """A function that runs the kernel, with a compiled gradient in reverse mode."""
    program, reference = _program(compiled, static), _gradient_of_generic(compiled, static)

    @jax.custom_vjp
    def function(*arrays: Array | None) -> tuple[Array, ...]:
        return program(*arrays)

    def forward(*arrays: Array | None) -> tuple[tuple[Array, ...], Any]:
        outputs = function(*arrays)
        # what the gradient does not read need not stay in memory
        read = [None if i in compiled.unread else x for i, x in enumerate((*arrays, *outputs))]
        return outputs, (tuple(read[: len(arrays)]), tuple(read[len(arrays) :]))

    def backward(saved: tuple[Arrays, Arrays], grads: tuple[Array, ...]) -> Arrays:
        return gradient(*saved, grads)

    function.defvjp(forward, backward)

    @jax.custom_vjp
    def gradient(arrays: Arrays, outputs: Arrays, grads: tuple[Array, ...]) -> Arrays:
        assert compiled.launch_backward is not None
        # a cotangent in JAX is the conjugate of ∂/∂Re + i ∂/∂Im
        return _conj(compiled.launch_backward(arrays, dict(static), outputs, _conj(grads), InProgram()))

    def gradient_forward(*saved: Any) -> tuple[Arrays, Any]:
        return gradient(*saved), saved

    def gradient_backward(saved: Any, grads: Arrays) -> Any:
        """Derivatives of the gradient, through a form that JAX can differentiate to any order."""
        return jax.vjp(reference, *saved)[1](grads)

    gradient.defvjp(gradient_forward, gradient_backward)

    def typed(*arrays: Array | None) -> tuple[Array, ...]:
        # Arrays must have the shard type of their gradients. JAX then adds up the gradients over shards that share an
        # array.
        return function(*shard_types.vary(arrays, shard_types.axes_of(arrays)))

    return typed


def _gradient_of_generic(compiled: Compiled, static: Static) -> Callable[[Arrays, Arrays, Arrays], Arrays]:
    """The gradient in a form that can be differentiated: the kernel's own `gradient`, else that of the generic form."""
    kernel, generic = kernel_of(compiled), _generic(compiled, static)

    def gradient(arrays: Arrays, outputs: Arrays, grads: Arrays) -> Arrays:
        if kernel.gradient is not None:
            return _conj(kernel.gradient(arrays, outputs, _conj(grads), **dict(static)))
        found = jax.vjp(generic, *arrays)[1](grads)  # what has no derivative, such as integers, has None here
        return tuple(None if x is None or x.dtype == jax.dtypes.float0 else x for x in found)

    return gradient


def _conj(tree: Any) -> Any:
    """The conjugates; the cotangent of an array of integers, float0, stays."""
    return jax.tree.map(lambda x: x if x.dtype == jax.dtypes.float0 else jnp.conj(x), tree)
