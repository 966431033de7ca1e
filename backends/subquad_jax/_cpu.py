"""Whether XLA can call the compiled CPU kernels here."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable

import jax
from jax import Array

from subquad_numpy._kernels import without_numba


def declines(first: Array, *others: Array | None) -> str | None:
    """Why the compiled kernels cannot take the arrays."""
    if reason := without_numba():
        return reason
    for x in (first, *others):
        if isinstance(x, jax.core.Tracer):
            continue
        if x is not None and any(device.platform != "cpu" for device in x.devices()):
            return f"it runs on the CPU, the arrays are on {x.devices()}"
    if jax.default_backend() != "cpu":
        return f"it runs on the CPU, JAX's default is {jax.default_backend()}"
    if 0 in first.shape:
        return "an axis is empty"
    return None


@functools.cache
def self_check(is_right: Callable[[], bool]) -> str | None:
    """Does a round trip through XLA give the right numbers? The call frame is an interface of bytes."""
    if platform.system() not in ("Linux", "Darwin"):
        return f"its threads are not supported on {platform.system()}"
    try:
        with jax.ensure_compile_time_eval():
            right = is_right()
    except Exception as error:  # whatever went wrong, the generic form is there
        return f"its self-check failed: {error}"
    return None if right else "its self-check gave wrong numbers"
