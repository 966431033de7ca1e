"""Compiled NumPy kernels under JAX, called by XLA from within a program. No kernel has code of its own here.

                              first gradient                          further derivatives
    gradient compiled         compiled, by `jax.custom_vjp`           of the kernel's `gradient`, else the generic form
    made of other kernels     of these, by `jax.custom_vjp`           of these
    gradient not compiled     of the generic form                     of the generic form
    outputs constant          none                                    none

Under `vmap` a kernel with batch axes gets one more batch axis; the other kernels run item by item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax import Array

from subquad.backend import Call, Override
from subquad.core.override import PLAIN, UNLESS_UNDER
from subquad_jax import conditions
from subquad_jax.batch_axes import Arrays, Function
from subquad_jax.gradients import with_gradient, with_gradient_of_parts
from subquad_jax.programs import MOST_KEPT, InProgram, Static, generic, has_key_mask, kernel_of, mapped, program
from subquad_numpy.compiled import Compiled
from subquad_numpy.table import HALF


def as_override(compiled: Compiled) -> Override:
    """The override "compiled" of a compiled kernel."""
    also = compiled.accepts.also

    def declines(call: Call) -> str | None:
        # what is traced runs as a plain call does
        reason = None if also is None else also(replace(call, conditions=PLAIN))
        return reason or conditions.declines(call, _round_trip_is_right)

    # `jax.custom_vjp` has no forward mode
    under = frozenset(UNLESS_UNDER) - ({"tangents"} if _has_reverse_mode_alone(compiled) else frozenset())
    dtypes = (
        compiled.accepts.dtypes
        if compiled.launches_half
        else tuple(x for x in compiled.accepts.dtypes if x not in HALF)
    )
    accepts = replace(compiled.accepts, dtypes=dtypes, under=under, also=declines)
    return Override(compiled.kernel, "compiled", partial(run, compiled), accepts)


def run(compiled: Compiled, *arrays: Array | None, **keywords: Any) -> Any:
    """The outputs of a kernel by compiled code: what the override runs."""
    if has_key_mask(compiled):
        arrays = (*arrays, keywords.pop("key_mask", None))
    arrays = compiled.as_read(arrays, _widened)
    if compiled.constant:
        arrays = tuple(None if x is None else jax.lax.stop_gradient(x) for x in arrays)
    traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
    static = tuple(sorted(keywords.items()))
    found = (_transformable if traced else _eager)(compiled, static)(*arrays)
    return found[0] if len(found) == 1 else found


def _widened(x: Array) -> Array:
    return x.astype(np.float32) if x.dtype.name in HALF else x


def _round_trip_is_right() -> bool:
    from subquad_jax import ffi

    return ffi.round_trip_is_right()


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
            return program(compiled, static)(*arrays)
        return found

    return function


@lru_cache(MOST_KEPT)
def _transformable(compiled: Compiled, static: Static) -> Function:
    """A function of the arrays that runs the kernel, and that JAX may transform."""
    if compiled.launch_backward is not None:
        return with_gradient(compiled, static)
    has_parts = kernel_of(compiled).parts is not None
    return (with_gradient_of_parts if has_parts else _by_generic)(compiled, static)


def _has_reverse_mode_alone(compiled: Compiled) -> bool:
    """Whether the gradient is one of `jax.custom_vjp`."""
    return compiled.launch_backward is not None or kernel_of(compiled).parts is not None


def _by_generic(compiled: Compiled, static: Static) -> Function:
    """A function that runs the kernel, and takes all derivatives from the generic form."""
    reference, run = generic(compiled, static), mapped(compiled, static)

    @jax.custom_jvp
    def function(*arrays: Array | None) -> tuple[Array, ...]:
        return run(*arrays)

    @function.defjvp
    def tangents(primals: Arrays, tangents: Arrays) -> Any:
        return jax.jvp(reference, primals, tangents)

    return function
