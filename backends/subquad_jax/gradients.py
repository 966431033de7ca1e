"""Compiled gradients under JAX: a kernel with a `jax.custom_vjp`.

The forward pass of a gradient keeps arrays and outputs, and what the kernel `saves`. `need` says which arrays want a
gradient. It stands among what is kept as a tree without leaves, () for True and None for False.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from subquad_jax import branches, shard_types
from subquad_jax.batch_axes import Arrays, Function, gradient_with_batch_axes
from subquad_jax.programs import (
    MOST_KEPT,
    PRECISE,
    InProgram,
    Static,
    generic,
    has_key_mask,
    kernel_of,
    mapped,
    program,
)
from subquad_numpy.compiled import Compiled
from subquad_numpy.runtime.launch import to_shape

Need = tuple[bool, ...]


class OfGradient(InProgram):
    """A `runtime.launch.GradientRun`; `otherwise()` is the gradient by the arrays of the generic form."""

    def __init__(self, need: Need, arrays: Arrays, otherwise: Callable[[], Arrays]) -> None:
        self.need, self.arrays, self.otherwise = need, arrays, otherwise

    def unless(self, condition: Array, compute: Callable[[], Arrays | None]) -> Arrays | None:
        likes = jax.eval_shape(compute)
        if likes is None:
            return None

        def other() -> Arrays:
            return tuple(None if like is None else x for x, like in zip(self.otherwise(), likes, strict=True))

        def own() -> Arrays:
            found = compute()
            assert found is not None
            return _fitted(found, self.arrays)

        return branches.either(condition, other, own)


def with_gradient(compiled: Compiled, static: Static) -> Function:
    """A function that runs the kernel, with a compiled gradient in reverse mode."""
    make = mapped if compiled.broadcasts else program

    def differentiable(run: Function, saving: Function | None) -> Function:
        """`run`, for which `saving` is called where a gradient is taken; None: `run` returns what is saved itself."""

        @jax.custom_vjp
        def function(*arrays: Array | None) -> tuple[Array, ...]:
            return run(*arrays)

        def forward(*primals: Any) -> tuple[Arrays, Any]:
            arrays = tuple(None if x is None else x.value for x in primals)
            need = tuple(() if x is not None and x.perturbed else None for x in primals)
            found = (saving or function)(*arrays)
            # what the gradient does not read need not stay in memory
            kept = [None if i in compiled.unread else x for i, x in enumerate((*arrays, *found))]
            outputs = found[: _count_outputs(compiled, static, arrays)] if saving else found
            return outputs, (tuple(kept[: len(arrays)]), tuple(kept[len(arrays) :]), need)

        def backward(kept: Any, grads: Sequence[Any]) -> Arrays:
            arrays, outputs, need = kept
            if compiled.saves:
                grads = grads[: _count_outputs(compiled, static, arrays)]
            by = tuple(None if isinstance(x, SymbolicZero) and compiled.broadcasts else _filled(x) for x in grads)
            return _gradient(compiled, static, tuple(x is not None for x in need))(arrays, outputs, by)

        function.defvjp(forward, backward, symbolic_zeros=True)
        return function

    saving = differentiable(make(compiled, static, save=True), None) if compiled.saves else None
    function = differentiable(make(compiled, static), saving)

    def typed(*arrays: Array | None) -> tuple[Array, ...]:
        # Arrays must have the shard type of their gradients. JAX then adds up the gradients over shards that share an
        # array.
        return function(*shard_types.vary(arrays, shard_types.axes_of(arrays)))

    return typed


def with_gradient_of_parts(compiled: Compiled, static: Static) -> Function:
    """A function that runs the kernel, and where a gradient is taken, the kernels that it is made of."""
    run, parts = mapped(compiled, static), kernel_of(compiled).parts
    assert parts is not None

    @jax.custom_vjp
    def function(*arrays: Array) -> tuple[Array, ...]:
        return run(*arrays)

    def forward(*primals: Any) -> tuple[Arrays, Any]:
        wanted = [i for i, x in enumerate(primals) if x.perturbed]

        def composed(*some: Array) -> tuple[Array, ...]:
            arrays = [x.value for x in primals]
            for i, x in zip(wanted, some, strict=True):
                arrays[i] = x
            return (parts(*arrays, **dict(static)),)

        with PRECISE():  # it may be traced after the call that it belongs to
            found, pull = jax.vjp(composed, *(primals[i].value for i in wanted))
        return found, (pull, tuple(() if x.perturbed else None for x in primals))

    def backward(kept: Any, grads: Sequence[Any]) -> Arrays:
        pull, need = kept
        found = iter(pull(tuple(map(_filled, grads))))
        return tuple(None if x is None else next(found) for x in need)

    function.defvjp(forward, backward, symbolic_zeros=True)
    return function


@lru_cache(MOST_KEPT)
def _gradient(compiled: Compiled, static: Static, need: Need) -> Callable[[Arrays, Arrays, Arrays], Arrays]:
    """The gradients by the arrays, a function of arrays, outputs (also what is saved) and gradients by outputs."""
    reference = _of_generic(compiled, static)

    def launched(arrays: Arrays, outputs: Arrays, grads: Arrays) -> Arrays:
        assert compiled.launch_backward is not None
        run = OfGradient(need, arrays, lambda: reference(arrays, outputs, grads))
        # a cotangent in JAX is the conjugate of ∂/∂Re + i ∂/∂Im
        found = compiled.launch_backward(arrays, dict(static), outputs, _conj(grads), run)
        return reference(arrays, outputs, grads) if found is None else _conj(_fitted(found, arrays))

    run = gradient_with_batch_axes(jax.jit(launched), has_key_mask(compiled)) if compiled.broadcasts else launched

    @jax.custom_vjp
    def gradient(arrays: Arrays, outputs: Arrays, grads: Arrays) -> Arrays:
        return run(arrays, outputs, grads)

    def forward(*given: Any) -> tuple[Arrays, Any]:
        return gradient(*given), given

    def backward(given: Any, seeds: Arrays) -> Any:
        """Derivatives of the gradient, through a form that JAX can differentiate to any order."""

        def found(*given: Any) -> Arrays:
            return tuple(None if seed is None else x for x, seed in zip(reference(*given), seeds, strict=True))

        return jax.vjp(found, *given)[1](seeds)

    gradient.defvjp(forward, backward)
    return gradient


def _of_generic(compiled: Compiled, static: Static) -> Callable[[Arrays, Arrays, Arrays], Arrays]:
    """The gradient in a form that can be differentiated: the kernel's own `gradient`, else that of the generic form."""
    kernel = kernel_of(compiled)

    def gradient(arrays: Arrays, outputs: Arrays, grads: Arrays) -> Arrays:
        if kernel.gradient is not None:
            return _conj(kernel.gradient(arrays, outputs, _conj(grads), **dict(static)))
        made, pull = jax.vjp(generic(compiled, static, outputs), *arrays)
        by = tuple(jnp.zeros_like(x) if by is None else by for x, by in zip(made, grads, strict=True))
        found = pull(by)  # what has no derivative, such as integers, has None here
        return tuple(None if x is None or x.dtype == jax.dtypes.float0 else x for x in found)

    return gradient


def _count_outputs(compiled: Compiled, static: Static, arrays: Arrays) -> int:
    """The number of outputs of the kernel, without what is saved."""
    *given, mask = arrays if has_key_mask(compiled) else (*arrays, None)
    more = {"key_mask": mask} if has_key_mask(compiled) else {}
    return len(kernel_of(compiled).outputs(*given, **dict(static), **more))


def _filled(grad: Any) -> Any:
    """A gradient, zeros in place of a symbol for them; that of integers has the dtype float0."""
    if not isinstance(grad, SymbolicZero):
        return grad
    if grad.dtype == jax.dtypes.float0:
        return np.zeros(grad.shape, jax.dtypes.float0)
    return jnp.zeros(grad.shape, grad.dtype)


def _fitted(grads: Arrays, arrays: Arrays) -> Arrays:
    """Gradients added up to the shapes of the arrays that they are by; None in `arrays` is one that was not kept."""
    return tuple(
        by if by is None or x is None else to_shape(jnp, by, tuple(x.shape))
        for by, x in zip(grads, arrays, strict=True)
    )


def _conj(tree: Any) -> Any:
    """The conjugates; the cotangent of an array of integers, float0, stays."""
    return jax.tree.map(lambda x: x if x.dtype == jax.dtypes.float0 else jnp.conj(x), tree)
