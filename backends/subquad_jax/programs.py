"""A compiled kernel as functions of JAX arrays, the key mask last, that return a tuple: by XLA calls, or generic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
from jax import Array

import subquad.kernels
from subquad.core.kernel import Kernel
from subquad_jax import branches
from subquad_jax.batch_axes import Arrays, Function, with_batch_axes
from subquad_numpy.compiled import Compiled
from subquad_numpy.runtime.launch import Launch

Static = tuple[tuple[str, Any], ...]
PRECISE = partial(jax.default_matmul_precision, "highest")
MOST_KEPT = 256  # maximum functions kept, one for each kernel and its options


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


@lru_cache(MOST_KEPT)
def program(compiled: Compiled, static: Static, *, save: bool = False) -> Function:
    """A function of the arrays that runs the kernel, changes included, as one program; `save` is that of `launch`."""

    def function(*arrays: Array | None) -> tuple[Array, ...]:
        assert compiled.launch is not None
        return compiled.launch(arrays, dict(static), InProgram(), **({"save": True} if save else {}))

    return jax.jit(function)


def mapped(compiled: Compiled, static: Static, *, save: bool = False) -> Function:
    """`program` with a rule for `vmap`: batch axes of the kernel broadcast, so that it runs once."""
    run, has_mask = program(compiled, static, save=save), has_key_mask(compiled)

    def own_axes(i: int, count: int) -> int:
        return 1 if has_mask and i == count - 1 else 2

    # the generic form says for which kernels it is so
    return with_batch_axes(run, run if save else generic(compiled, static), own_axes)


def has_key_mask(compiled: Compiled) -> bool:
    """Whether the last array is a key mask."""
    return "key_mask" in kernel_of(compiled).options


def generic(compiled: Compiled, static: Static, outputs: Arrays | None = None) -> Function:
    """The generic form as a function of all arrays, the key mask last, that returns a tuple.

    With the `outputs` of the compiled kernel, the shift of a state is the one that they have: see `Kernel.pinned`.
    """
    kernel, has_mask = kernel_of(compiled), has_key_mask(compiled)

    def function(*arrays: Array | None) -> tuple[Array, ...]:
        *given, mask = arrays if has_mask else (*arrays, None)
        with PRECISE():  # a rule of differentiation may be traced after the call that it belongs to
            keywords = dict(static) | ({"key_mask": mask} if has_mask else {})
            if kernel.pinned is not None and outputs is not None:
                return tuple(kernel.pinned(tuple(given), outputs, **keywords))
            found = kernel.generic(*given, **keywords)
        return tuple(found) if isinstance(found, tuple) else (found,)

    return function
